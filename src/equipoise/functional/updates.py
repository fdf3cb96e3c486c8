"""Rules that move the selection bias of an expert from its recent load: pure functions of counts, for a rate of 1.

Each returns the step for one layer, (E,) fp64, positive for an expert that got too little. The violation is
v = (mean - counts) / mean, so every rule is blind to the size of the batch; with a `load_view` of groups and targets it
is (target - load) / target of an expert's group.
A rule gets its name in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .load_view import LoadView, target_violation

__all__ = [
    "RULES",
    "center",
    "center_factors",
    "momentum_step",
    "proportional_step",
    "rms_step",
    "sign_step",
    "violation",
]


def violation(counts_E: Tensor, view: LoadView | None = None) -> Tensor:
    """(mean - counts) / mean, (..., E) fp64: 1 for a dead expert, 0 in balance; all 0 when nothing was counted.

    >>> violation(torch.tensor([3, 1]))
    tensor([-0.5000,  0.5000], dtype=torch.float64)
    """
    if view is not None:
        return target_violation(view, counts_E)
    counts_E = counts_E.double()
    mean = counts_E.mean(dim=-1, keepdim=True)
    return torch.where(mean > 0, (mean - counts_E) / mean.clamp(min=1e-30), 0.0)


def sign_step(counts_E: Tensor, view: LoadView | None = None) -> Tensor:
    """sign(v): the same step however far from balance (DeepSeek, arXiv 2408.15664, Alg. 1; u = 1e-3 with sigmoid).

    >>> sign_step(torch.tensor([9, 1, 5]))
    tensor([-1.,  1.,  0.], dtype=torch.float64)
    """
    return violation(counts_E, view).sign()


def proportional_step(counts_E: Tensor, view: LoadView | None = None) -> Tensor:
    """v itself: slows down near balance. The rule for softmax gates (2408.15664 App. C; LongCat-Flash, with rate mu E).

    >>> proportional_step(torch.tensor([3, 1]))
    tensor([-0.5000,  0.5000], dtype=torch.float64)
    """
    return violation(counts_E, view)


def rms_step(counts_E: Tensor, view: LoadView | None = None) -> Tensor:
    """v / RMS(v): a step of the sign rule's size that keeps the proportions (kexue.fm 10757).

    >>> rms_step(torch.tensor([3, 1]))
    tensor([-1.,  1.], dtype=torch.float64)
    """
    v_E = violation(counts_E, view)
    return v_E / v_E.square().mean(dim=-1, keepdim=True).sqrt().clamp(min=1e-12)


def momentum_step(
    counts_E: Tensor, momentum_E: Tensor, kappa: float = 2.0, beta: float = 0.5, view: LoadView | None = None
) -> Tensor:
    """The new momentum, also the step: m = beta m + (1 - beta) center(tanh(kappa v)) (SMEBU, arXiv 2602.17004).

    >>> momentum_step(torch.tensor([2, 2]), torch.zeros(2, dtype=torch.float64))
    tensor([0., 0.], dtype=torch.float64)
    """
    return beta * momentum_E + (1 - beta) * center(torch.tanh(kappa * violation(counts_E, view)))


def center(bias_E: Tensor) -> Tensor:
    """Subtracts the mean: adding a constant to all biases selects the same experts, so it may not drift (B45, B52).

    >>> center(torch.tensor([1.0, 3.0]))
    tensor([-1.,  1.])
    """
    return bias_E - bias_E.mean(dim=-1, keepdim=True)


def center_factors(bias_E: Tensor) -> Tensor:
    """The same for a bias that multiplies scores by 1 + b: divides these factors by their mean, so that b has mean 0.

    >>> center_factors(torch.tensor([1.0, 5.0]))
    tensor([-0.5000,  0.5000])
    """
    factor_E = 1 + bias_E
    return factor_E / factor_E.mean(dim=-1, keepdim=True) - 1


RULES: dict[str, Callable[..., Tensor]] = {
    "sign": sign_step,
    "proportional": proportional_step,
    "rms": rms_step,
    "momentum": momentum_step,
}
