"""Balance, entropy and z-loss as plain functions with autograd: the formulas that the fused paths are tested against.

One convention everywhere: load fractions f are divided by K, so f sums to 1 and perfect balance has the value 1.
f carries no gradient; P does (GShard; Demons in the Detail, arXiv 2501.11873, eq. 2).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import InputError
from .gates import gate_log_scores, wide
from .load_view import LoadView, seen_load
from .routing import check_mask_dtype, count_choices

__all__ = ["balance_loss", "entropy_loss", "load_fractions", "segment_counts", "sequence_segments", "z_loss"]


def load_fractions(counts_E: Tensor) -> Tensor:
    """f = counts / (K T), (..., E): sums to 1; all zero where nothing was counted, so an empty batch pushes nothing.

    K T is the sum of the counts: where some tokens use fewer than K experts, f is still the share of the work.

    >>> load_fractions(torch.tensor([3, 1, 0, 0]))
    tensor([0.7500, 0.2500, 0.0000, 0.0000], dtype=torch.float64)
    """
    counts_E = counts_E.double()
    return counts_E / counts_E.sum(dim=-1, keepdim=True).clamp(min=1)


def sequence_segments(
    num_sequences: int, length: int, per_segment: int = 1, device: torch.device | str | None = None
) -> Tensor:
    """Segment of each token, (num_sequences * length,), when ``per_segment`` neighbouring sequences share one f.

    >>> sequence_segments(3, 2, per_segment=2)
    tensor([0, 0, 0, 0, 1, 1])
    """
    return torch.arange(num_sequences * length, device=device) // (length * per_segment)


def segment_counts(
    expert_ids_TK: Tensor, num_experts: int, segment_T: Tensor, token_mask_T: Tensor | None = None
) -> Tensor:
    """Counts of each segment, (S, E) int64, S = highest segment + 1; as `count_choices` otherwise.

    >>> segment_counts(torch.tensor([[0], [1], [1]]), 2, torch.tensor([0, 1, 1]))
    tensor([[1, 0],
            [0, 2]])
    """
    num_segments = int(segment_T.max()) + 1 if segment_T.numel() else 1
    one_T = torch.ones_like(segment_T) if token_mask_T is None else token_mask_T.bool()
    bins = num_experts + 1
    flat_TK = segment_T.unsqueeze(1) * bins + expert_ids_TK
    counts = torch.zeros(num_segments * bins, dtype=torch.int64, device=expert_ids_TK.device)
    ones_TK = one_T.long().unsqueeze(1).expand_as(expert_ids_TK)
    return counts.scatter_add_(0, flat_TK.reshape(-1), ones_TK.reshape(-1)).view(num_segments, bins)[:, :num_experts]


def balance_loss(
    probs_TE: Tensor,
    expert_ids_TK: Tensor,
    *,
    segment_T: Tensor | None = None,
    token_mask_T: Tensor | None = None,
    counts_E: Tensor | None = None,
    view: LoadView | None = None,
) -> Tensor:
    """Mean over valid tokens of E <f, p_t>: a scalar, 1 at perfect balance.

    f is measured over the token's own segment: one segment (the default) is the micro-batch, ``sequence_segments``
    gives sequences or n of them, document numbers give documents in a pack. ``counts_E`` replaces f by that of other
    tokens: a whole global batch, for the global-batch loss (arXiv 2501.11873, eq. 4-6). ``view``: groups, costs and
    targets, as `load_view` makes it of them.

    Computed in fp32 or wider. Without a valid token the value is 0. Raises InputError when both ``segment_T`` and
    ``counts_E`` are given, or for a mask of another shape.

    >>> probs = torch.full((4, 2), 0.5)
    >>> balance_loss(probs, torch.tensor([[0], [0], [1], [1]]))
    tensor(1.)
    """
    if segment_T is not None and counts_E is not None:
        raise InputError(expected="one source of f", got="both segment_T and counts_E", do="pass one of them")
    probs_TE = wide(probs_TE)
    num_experts = probs_TE.shape[1]
    _check_mask(token_mask_T, probs_TE.shape[:1])
    if segment_T is not None:
        fraction_SE = load_fractions(segment_counts(expert_ids_TK, num_experts, segment_T, token_mask_T))
        fraction_SE = seen_load(view, fraction_SE)
        value_T = (fraction_SE.to(probs_TE.dtype)[segment_T] * probs_TE).sum(dim=-1)
    else:  # one f for all tokens: a matrix product reads p once and writes nothing of its size
        if counts_E is None:
            counts_E = count_choices(expert_ids_TK, num_experts, token_mask_T)[0]
        value_T = probs_TE @ seen_load(view, load_fractions(counts_E)).to(probs_TE.dtype)
    return _token_mean(num_experts * value_T, token_mask_T)


def z_loss(logits_TE: Tensor, token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over valid tokens of logsumexp(z)^2 (ST-MoE, arXiv 2202.08906, eq. 5): keeps logits small. A scalar.

    >>> z_loss(torch.zeros(3, 1))
    tensor(0.)
    """
    logits_TE = wide(logits_TE)
    return _token_mean(logits_TE.logsumexp(dim=-1).square(), token_mask_T)


def entropy_loss(logits_TE: Tensor, gate: str = "softmax", token_mask_T: Tensor | None = None) -> Tensor:
    """Mean over valid tokens of the entropy - sum_e p_e ln p_e of the gate probabilities, in nats (arXiv 2403.07652,
    the dynamic loss): 0 where every router is sure, ln E where it knows nothing. A scalar.

    >>> entropy_loss(torch.zeros(3, 4)) / torch.tensor(4.0).log()
    tensor(1.)
    """
    logs_TE = gate_log_scores(logits_TE, gate).log_softmax(dim=-1)
    terms_TE = logs_TE.exp() * logs_TE.masked_fill(logs_TE == float("-inf"), 0)  # p ln p is 0 where p is, its slope too
    return _token_mean(-terms_TE.sum(dim=-1), token_mask_T)


def _token_mean(value_T: Tensor, token_mask_T: Tensor | None) -> Tensor:
    if token_mask_T is None:
        return value_T.sum() / max(value_T.numel(), 1)
    _check_mask(token_mask_T, value_T.shape)
    mask_T = token_mask_T.bool()
    return (value_T * mask_T).sum() / mask_T.sum().clamp(min=1)


def _check_mask(token_mask_T: Tensor | None, shape: torch.Size) -> None:
    check_mask_dtype(token_mask_T)
    if token_mask_T is not None and token_mask_T.shape != shape:  # (T, 1) would broadcast to all pairs of tokens
        raise InputError(
            expected=f"token_mask_T of shape {tuple(shape)}",
            got=str(tuple(token_mask_T.shape)),
            do="pass one entry per token",
        )
