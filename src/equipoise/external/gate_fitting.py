"""Finds the gate that a router's weights follow from, by computing the weights of each gate from its logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..functional.routing import GATES, gate_scores
from .output_formats import RouterOutput

__all__ = [
    "CLOSE",
    "GateFit",
    "are_probabilities",
    "as_logits",
    "fit_gate",
    "fit_temperature",
    "gate_weights",
    "log_probabilities",
    "relative_difference",
]

CLOSE = 2e-2  # relative; weights may be bf16


class GateFit(NamedTuple):
    """The gate that fits best: weights are its scores times ``scale``, divided by their sum if ``normalize``."""

    distance: float  # the largest relative difference; a fit up to ``CLOSE``
    gate: str
    normalize: bool
    scale: float


def fit_gate(output: RouterOutput) -> GateFit:
    """Compares the weights with those of each gate of ``functional.GATES``, normalized or not.

    Tokens with dropped choices (id -1) are left out where others exist: a dropped weight may be part of the sum.

    >>> logits_TE = 2 * torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    >>> weights_TK, ids_TK = (3 * logits_TE.sigmoid()).topk(2)
    >>> fit = fit_gate(RouterOutput(logits_TE, weights_TK, ids_TK))
    >>> fit.gate, fit.normalize, round(fit.scale, 3)
    ('sigmoid', False, 3.0)
    """
    weights_TK, z_TE, ids_TK = output.weights_TK.float(), as_logits(output.logits_TE), output.ids_TK
    complete_T = (ids_TK >= 0).all(dim=-1)
    if complete_T.any():
        weights_TK, z_TE, ids_TK = weights_TK[complete_T], z_TE[complete_T], ids_TK[complete_T]
    else:
        some_T = (ids_TK >= 0).any(dim=-1)
        weights_TK, z_TE, ids_TK = weights_TK[some_T], z_TE[some_T], ids_TK[some_T]
        weights_TK = weights_TK.masked_fill(ids_TK < 0, 0.0)
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    total = float(total_T1.mean())
    normalized = bool(((total_T1 - total).abs() < CLOSE * abs(total)).all())
    fits = []
    for gate in GATES:
        made_TK = gate_weights(z_TE, ids_TK, gate, normalized)
        scale = total if normalized else float((weights_TK / made_TK.clamp(min=1e-20))[ids_TK >= 0].median())
        fits.append(GateFit(relative_difference(weights_TK, scale * made_TK), gate, normalized, scale))
    return min(fits, key=lambda fit: fit.distance)  # the first of equal fits, as with K = 1


def fit_temperature(output: RouterOutput) -> float | None:
    """The temperature that logits are divided by before a softmax, if the weights follow from one."""
    complete_T = (output.ids_TK >= 0).all(dim=-1)
    z_TE, weights_TK, ids_TK = (
        as_logits(output.logits_TE)[complete_T],
        output.weights_TK.float()[complete_T],
        output.ids_TK[complete_T],
    )
    z_TK, log_TK = z_TE.gather(-1, ids_TK), weights_TK.clamp(min=1e-30).log()
    valid_TK = torch.isfinite(z_TK) & (weights_TK > 1e-6)
    z_TK, log_TK = z_TK[valid_TK.all(dim=-1)], log_TK[valid_TK.all(dim=-1)]
    z_TK, log_TK = z_TK - z_TK.mean(dim=-1, keepdim=True), log_TK - log_TK.mean(dim=-1, keepdim=True)
    product = float((z_TK * log_TK).sum())
    if not product > 0:
        return None
    found = float(f"{float(z_TK.square().sum()) / product:.4g}")
    fit = fit_gate(RouterOutput(z_TE / found, weights_TK, ids_TK))
    return found if fit.distance <= CLOSE and fit.gate == "softmax" else None


def gate_weights(z_TE: Tensor, ids_TK: Tensor, gate: str, normalize: bool) -> Tensor:
    """Weights (T, K) that a gate gives to these choices, before the constant factor; 0 for dropped choices (id -1)."""
    scores_TK = gate_scores(z_TE, gate).gather(-1, ids_TK.clamp(min=0))
    chosen_TK = scores_TK.clamp(min=1e-20).masked_fill(ids_TK < 0, 0.0)
    return chosen_TK / chosen_TK.sum(-1, keepdim=True).clamp(min=1e-20) if normalize else chosen_TK


def are_probabilities(x_TE: Tensor) -> bool:
    """Whether every row is non-negative and sums to 1, as softmax probabilities returned in place of logits do.

    >>> are_probabilities(torch.randn(4, 8).softmax(dim=-1)), are_probabilities(torch.randn(4, 8))
    (True, False)
    """
    return bool((x_TE >= 0).all() and ((x_TE.float().sum(dim=-1) - 1).abs() < CLOSE).all())


def as_logits(x_TE: Tensor) -> Tensor:
    """Logits in fp32; of a router that returns probabilities, their logarithms."""
    return x_TE.float().clamp(min=1e-30).log() if are_probabilities(x_TE) else x_TE.float()


def log_probabilities(probs_TE: Tensor) -> Tensor:
    """Logarithms in the same dtype, finite where a probability underflowed to 0."""
    return probs_TE.clamp(min=torch.finfo(probs_TE.dtype).tiny).log()


def relative_difference(x: Tensor, reference: Tensor) -> float:
    """The largest relative difference; 0 for empty tensors."""
    return float(((x - reference).abs() / (reference.abs() + 1e-4)).max()) if x.numel() else 0.0
