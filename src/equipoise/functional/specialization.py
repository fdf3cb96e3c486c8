"""What an expert knows: co-activation, overlap of choices, entropy, and how much of an information is bias.

Shapes: T tokens, E experts, K experts per token, D domains. docs/measures.md has definitions and sources.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import gate_log_scores

__all__ = ["chosen", "churn", "coactivation", "information_bias", "log_probs", "overlap", "similarity"]


def log_probs(logits_TE: Tensor, gate: str) -> Tensor:
    """Logarithm of the gate probabilities, (T, E), in fp32 or wider; at least -1e4, so that p ln p is never 0 · -inf.

    >>> log_probs(torch.zeros(1, 4), "sigmoid").exp()
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    return gate_log_scores(logits_TE, gate).log_softmax(dim=-1).clamp_(min=-1e4)


def chosen(ids_TK: Tensor, num_experts: int) -> Tensor:
    """Which experts a token goes to, (T, E) fp32 of zeros and ones; an id of E is none.

    >>> chosen(torch.tensor([[0, 2], [1, 4]]), 4)
    tensor([[1., 0., 1., 0.],
            [0., 1., 0., 0.]])
    """
    return torch.zeros(len(ids_TK), num_experts + 1, device=ids_TK.device).scatter_(-1, ids_TK, 1.0)[:, :num_experts]


def coactivation(chosen_TE: Tensor) -> Tensor:
    """Tokens that chose both experts, (E, E) int64; on the diagonal, those that chose the one (OLMoE, 2409.02060).

    Exact for fewer than 2^24 tokens in one call.

    >>> coactivation(chosen(torch.tensor([[0, 1], [0, 2]]), 3))
    tensor([[2, 1, 1],
            [1, 1, 0],
            [1, 0, 1]])
    """
    return (chosen_TE.T @ chosen_TE).long()


def overlap(ids_TK: Tensor, other_TK: Tensor) -> Tensor:
    """How many experts two choices have in common, (T,) int64; over K, router saturation (OLMoE, 2409.02060).

    >>> overlap(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 4]]))
    tensor([2, 1])
    """
    return (ids_TK.unsqueeze(-1) == other_TK.unsqueeze(-2)).any(dim=-1).sum(dim=-1)


def churn(ids_TK: Tensor, before_TK: Tensor, num_experts: int | None = None) -> Tensor:
    """Share of a token's K choices that were not among its K before, (T,) fp64; NaN where a choice is -1, not known.

    ``num_experts``: where tokens may use fewer than K experts (``top_p``): an id of E, no expert, is then no choice.
    For K = 1 its mean is the share of tokens that change their expert: routing fluctuation (StableMoE, 2204.08396).

    >>> churn(torch.tensor([[0, 1], [2, 3], [-1, -1]]), torch.tensor([[1, 0], [3, 4], [0, 1]]))
    tensor([0.0000, 0.5000,    nan], dtype=torch.float64)
    """
    known_T = (ids_TK >= 0).all(dim=-1) & (before_TK >= 0).all(dim=-1)
    none = 2**62 if num_experts is None else num_experts
    one_TK = ids_TK.long() < none  # 256 does not fit into the byte of 256 ids
    new_TK = (ids_TK.unsqueeze(-1) != before_TK.unsqueeze(-2)).all(dim=-1) & one_TK
    return torch.where(known_T, new_TK.sum(dim=-1).double() / one_TK.sum(dim=-1), torch.nan)


def similarity(gram_EE: Tensor, mean_E: Tensor | None = None) -> Tensor:
    """Cosines from inner products (E, E), or with means, correlations from mean products; 0 where nothing varies.

    >>> similarity(torch.tensor([[4.0, 2.0], [2.0, 1.0]]))
    tensor([[1., 1.],
            [1., 1.]], dtype=torch.float64)
    """
    gram_EE = gram_EE.double()
    if mean_E is not None:
        gram_EE = gram_EE - torch.outer(mean_E.double(), mean_E.double())
    norm_E = gram_EE.diagonal().clamp(min=0).sqrt()
    norm_EE = torch.outer(norm_E, norm_E)
    return torch.where(norm_EE > 1e-30, gram_EE / norm_EE.clamp(min=1e-30), 0.0).clamp(-1, 1)


def information_bias(counts_DE: Tensor, squares_DE: Tensor, windows: int) -> Tensor:
    """By how much I(expert; domain) from this much text is too high on average, in nats, (...).

    Each domain has ``windows`` windows of equally many choices; ``counts_DE`` (..., D, E) are sums over them and
    ``squares_DE`` sums of squares. A plug-in entropy is too low by half the sum of Var(f_e) / f_e (second order; Miller
    1955 for independent tokens: (E - 1) / 2N). Tokens of one window are not independent, so the variance is taken
    between windows. With independent choices and K = 1 this is (E - 1)(D - 1) / (2 N).

    >>> counts = torch.tensor([[6, 2], [3, 5]]); squares = torch.tensor([[20, 4], [5, 13]])
    >>> information_bias(counts, squares, windows=2)
    tensor(0.0603, dtype=torch.float64)
    """
    counts_DE, squares_DE = counts_DE.double(), squares_DE.double()
    if windows < 2:
        return counts_DE.new_zeros(counts_DE.shape[:-2])
    total_D1 = counts_DE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    share_DE = counts_DE / total_D1
    spread_DE = (squares_DE - counts_DE.square() / windows).clamp(min=0) * windows / (windows - 1)  # of the sum
    variance_DE = spread_DE / total_D1.square()
    overall_E = share_DE.mean(dim=-2)
    num_domains = counts_DE.shape[-2]
    within = _ratio(variance_DE, share_DE).sum(dim=-1).mean(dim=-1)
    together = _ratio(variance_DE.sum(dim=-2) / num_domains**2, overall_E).sum(dim=-1)
    return (within - together) / 2


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.clamp(min=1e-30), 0.0)
