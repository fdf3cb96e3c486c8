"""How far the gradient of each estimator is from that of the whole step's load."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..functional.losses import load_fractions

__all__ = ["estimator_error", "estimator_error_sums"]


def estimator_error_sums(
    names: Sequence[str], groups: Sequence[tuple[Sequence[tuple[dict[str, Tensor], Tensor]], Tensor]]
) -> Tensor:
    """(1 + 3 * names,) what `estimator_error` needs of one rank, to be added up over ranks.

    Args:
        groups: of each, for every micro-batch f (L, E) of each estimator and the Gram matrix; and the step's counts.

    The gradient is linear in f, so its error and cosine follow from f^T G f with G the Gram matrix of a micro-batch.
    """
    sums = torch.zeros(1 + 3 * len(names), dtype=torch.float64, device=groups[0][1].device if groups else None)
    for micro_batches, counts_LE in groups:
        truth_LE = load_fractions(counts_LE)
        for known, gram_LEE in micro_batches:

            def product(one_LE: Tensor, other_LE: Tensor, gram_LEE: Tensor = gram_LEE) -> Tensor:
                return torch.einsum("le,lef,lf->", one_LE, gram_LEE, other_LE)

            terms = [product(truth_LE, truth_LE)]
            for name in names:
                fraction_LE = known[name]
                off_LE = fraction_LE - truth_LE
                terms += [product(off_LE, off_LE), product(fraction_LE, truth_LE), product(fraction_LE, fraction_LE)]
            sums += torch.stack(terms).to(sums.device)
    return sums


def estimator_error(names: Sequence[str], sums: Tensor) -> dict[str, dict[str, float]]:
    """Relative error and cosine of each estimator's gradient at the logits against that of the whole step's f."""
    exact, *rest = sums.tolist()
    exact = max(exact, 1e-300)
    found: dict[str, dict[str, float]] = {"relative_error": {}, "cosine": {}}
    for name, error, cross, own in zip(names, rest[::3], rest[1::3], rest[2::3], strict=True):
        found["relative_error"][name] = (max(error, 0.0) / exact) ** 0.5
        found["cosine"][name] = cross / max((exact * max(own, 0.0)) ** 0.5, 1e-300)  # rounding may fall below 0
    return found
