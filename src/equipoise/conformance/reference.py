"""What is right, as loops in float64. Imports nothing of equipoise: it is what equipoise is held to as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cut", "bias_after", "chosen", "counts_of", "gradient_of"]

Cut = Sequence[Sequence[Any]]  # rank -> micro-batch -> (hidden_BSD, mask_BS or None)


def chosen(logits_E: Tensor, top_k: int) -> list[int]:
    """The K experts with the highest logit."""
    scores = logits_E.tolist()
    return sorted(range(len(scores)), key=lambda expert: scores[expert], reverse=True)[:top_k]


def counts_of(weight_ED: Tensor, cut: Cut, top_k: int) -> list[int]:
    """How many choices each expert gets in the step."""
    counts = [0] * len(weight_ED)
    for _, _, _, token_D in _tokens(cut):
        for expert in chosen(weight_ED.double() @ token_D, top_k):
            counts[expert] += 1
    return counts


def gradient_of(
    weight_ED: Tensor, cut: Cut, top_k: int, coef: float, scope: str, *, gate: str = "softmax", by_tokens: bool = True
) -> Tensor:
    """The gradient (E, D) of the step's balance loss, coef · E · <f, P>, with f held constant.

    Args:
        scope: "sequence", "micro_batch" or "global_batch": the tokens that share one f.
        gate: "softmax", or "sigmoid" divided by its sum.
        by_tokens: every token of the step weighs the same; False: every micro-batch does, whatever its tokens.
    """
    weight_ED = weight_ED.detach().double().requires_grad_()
    tokens = list(_tokens(cut))
    groups: dict[Any, list[Tensor]] = {}
    for rank, micro_batch, sequence, token_D in tokens:
        where = {"sequence": (rank, micro_batch, sequence), "micro_batch": (rank, micro_batch), "global_batch": ()}
        groups.setdefault(where[scope], []).append(weight_ED @ token_D)
    micro_batches = sum(len(of_rank) for of_rank in cut)
    loss = weight_ED.sum() * 0
    for key, logits in groups.items():
        counts = [0] * len(weight_ED)
        for logits_E in logits:
            for expert in chosen(logits_E, top_k):
                counts[expert] += 1
        share = len(logits) / len(tokens)
        if not by_tokens and key:
            inside = sum((rank, micro_batch) == key[:2] for rank, micro_batch, _, _ in tokens)
            share = len(logits) / inside / micro_batches
        for logits_E in logits:
            scores_E = logits_E.exp() if gate == "softmax" else logits_E.sigmoid()
            probs_E = scores_E / scores_E.sum()
            for expert, count in enumerate(counts):
                fraction = count / (top_k * len(logits))
                loss = loss + coef * len(counts) * fraction * probs_E[expert] * share / len(logits)
    (gradient_ED,) = torch.autograd.grad(loss, weight_ED)
    return gradient_ED


def bias_after(counts: Sequence[int], rate: float) -> list[float]:
    """A selection bias that began at zero, after the sign rule: up where an expert got fewer than the mean."""
    mean = sum(counts) / len(counts)
    return [rate * ((count < mean) - (count > mean)) for count in counts]


def _tokens(cut: Cut) -> Any:
    """(rank, micro-batch, sequence, hidden state) of every token that is no padding."""
    for rank, micro_batches in enumerate(cut):
        for micro_batch, (hidden_BSD, mask_BS) in enumerate(micro_batches):
            for sequence in range(hidden_BSD.shape[0]):
                for position in range(hidden_BSD.shape[1]):
                    if mask_BS is None or bool(mask_BS[sequence, position]):
                        yield rank, micro_batch, sequence, hidden_BSD[sequence, position].double()
