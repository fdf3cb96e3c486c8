"""The gates: how logits become scores and probabilities. Each has a twin in `kernels.triton_gate_functions`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import unknown_name

__all__ = ["GATES", "gate_log_scores", "gate_probs", "gate_scores", "gate_slope", "wide"]

GATES = ("softmax", "sigmoid", "sqrt_softplus")

FAR_BELOW_ZERO = -40.0  # softplus(z) differs from exp(z) by less than fp64 can hold


def gate_scores(logits_TE: Tensor, gate: str = "softmax") -> Tensor:
    """Affinity of every token to every expert, (T, E), in fp32 or wider; only softmax sums to 1 over the experts.

    ``sigmoid`` is DeepSeek-V3's gate, ``sqrt_softplus`` DeepSeek-V4's.

    >>> gate_scores(torch.zeros(1, 4))
    tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """
    z_TE = wide(logits_TE)
    match gate:
        case "softmax":
            return z_TE.softmax(dim=-1)
        case "sigmoid":
            return z_TE.sigmoid()
        case "sqrt_softplus":
            far_TE = z_TE < FAR_BELOW_ZERO  # there softplus(z) = exp(z), and the slope of sqrt at 0 would be infinite
            near_TE = F.softplus(z_TE.clamp(min=FAR_BELOW_ZERO)).sqrt()
            return torch.where(far_TE, (0.5 * z_TE.clamp(max=0.0)).exp(), near_TE)
    raise unknown_name("gate", gate, GATES)


def gate_log_scores(logits_TE: Tensor, gate: str = "softmax") -> Tensor:
    """Logarithm of the un-normalised score, exact where the score itself underflows (z = -110 in fp32).

    For softmax this is the logit itself: exp(z) is its un-normalised score.

    >>> gate_log_scores(torch.tensor([-200.0]), "sigmoid")
    tensor([-200.])
    """
    z_TE = wide(logits_TE)
    match gate:
        case "softmax":
            return z_TE
        case "sigmoid":
            return F.logsigmoid(z_TE)
        case "sqrt_softplus":  # softplus(z) -> exp(z) far below zero, where its logarithm is z
            near_TE = F.softplus(z_TE.clamp(min=FAR_BELOW_ZERO)).log()
            return 0.5 * torch.where(z_TE < FAR_BELOW_ZERO, z_TE, near_TE)
    raise unknown_name("gate", gate, GATES)


def gate_probs(logits_TE: Tensor, gate: str = "softmax") -> Tensor:
    """Gate probabilities p = g(z) / sum g(z), (T, E): what every balance loss calls P. Normalised in log space.

    >>> gate_probs(torch.tensor([[-110.0, -110.0]]), "sigmoid")
    tensor([[0.5000, 0.5000]])
    """
    return gate_log_scores(logits_TE, gate).softmax(dim=-1)


def gate_slope(logits_TE: Tensor, gate: str) -> Tensor:
    """d log g(z) / dz, (T, E): the factor between a softmax gate's gradient and this gate's.

    >>> gate_slope(torch.zeros(1), "sigmoid")
    tensor([0.5000])
    """
    z_TE = wide(logits_TE)
    match gate:
        case "softmax":
            return torch.ones_like(z_TE)
        case "sigmoid":
            return (-z_TE).sigmoid()
        case "sqrt_softplus":  # sigmoid / (2 softplus) tends to 1/2 far below zero
            near_TE = z_TE.clamp(min=FAR_BELOW_ZERO)
            return torch.where(z_TE < FAR_BELOW_ZERO, 0.5, 0.5 * near_TE.sigmoid() / F.softplus(near_TE))
    raise unknown_name("gate", gate, GATES)


def wide(x: Tensor) -> Tensor:
    """In fp32 or wider, as every gate computes."""
    return x if x.dtype == torch.float64 else x.float()
