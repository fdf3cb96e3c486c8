"""The law that peers are held against: the balance loss as loops in float64; imports neither them nor us."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def choices(row: Tensor, top_k: int) -> list[int]:
    """The K experts with the highest logit."""
    scores = row.detach().tolist()
    order = sorted(range(len(scores)), key=lambda e: scores[e], reverse=True)
    return order[:top_k]


def fractions(logits_TE: Tensor, top_k: int, tokens: Sequence[int]) -> list[float]:
    """f over some tokens: the share of all choices that each expert got."""
    counts = [0] * logits_TE.shape[1]
    for t in tokens:
        for e in choices(logits_TE[t], top_k):
            counts[e] += 1
    total = sum(counts)
    return [c / total if total else 0.0 for c in counts]


def law(
    logits_TE: Tensor, top_k: int, *, segment_T: Sequence[int] | None = None, valid_T: Sequence[bool] | None = None
) -> tuple[float, Tensor]:
    """(value, gradient at the logits (T, E)) of the mean over valid tokens of E <f of the token's segment, p of it>."""
    z_TE = logits_TE.detach().double().requires_grad_()
    segment = [0] * len(z_TE) if segment_T is None else list(segment_T)
    valid = [t for t in range(len(z_TE)) if valid_T is None or valid_T[t]]
    load = {s: fractions(z_TE, top_k, [t for t in valid if segment[t] == s]) for s in set(segment)}
    total = z_TE.new_zeros(())
    for t in valid:
        p_E = torch.exp(z_TE[t]) / torch.exp(z_TE[t]).sum()
        for e, f in enumerate(load[segment[t]]):
            total = total + z_TE.shape[1] * f * p_E[e] / len(valid)
    (gradient_TE,) = torch.autograd.grad(total, z_TE)
    return float(total.detach()), gradient_TE


def factor(got: Tensor, expected: Tensor, relative: float = 1e-4) -> float:
    """The number x with got = x * expected, where there is one to that precision; an AssertionError otherwise."""
    a, b = got.double().flatten(), expected.double().flatten()
    x = float(a @ b / (b @ b))
    off = float((a - x * b).norm() / a.norm().clamp(min=1e-300))
    assert off < relative, f"not a multiple of the law: off by {off:.3g} at the best factor {x:.3g}"
    return x
