"""Coefficients that set themselves, per layer, after each step, from what the step showed: one rule, two errors.

    coefficient <- coefficient * clip(error) ** gain, kept inside its limits

The error is above 1 where balance is to be pushed more: the share that is wanted over the share that was (`Ratio`), or
the MaxVio that was over the MaxVio that is wanted (`Target`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import ConfigError

__all__ = ["SELF_SETTING", "Ratio", "SelfSetting", "Target"]

LIMITS = (1e-5, 1.0)  # of a coefficient: the papers' lie between 1e-4 and 2e-2
LARGEST_RATIO_ERROR, LARGEST_TARGET_ERROR = 16.0, math.e


@dataclass(frozen=True)
class Ratio:
    """A coefficient whose balance gradient is a share of the language model's, in norm, at a router's logits.

    What is compared is what ``balance/<policy>/gradient_ratio`` shows, of one layer: the root of the squared gradients
    of all tokens of a step, of the policy and of the language model. After a step of ratio r the coefficient is
    multiplied by (share / r) ** (1 - decay), which an average over about 1 / (1 - decay) steps amounts to.

    Args:
        share: of the language model's gradient, above 0.
        start: the coefficient of the first step.
        decay: of what was before, per step; 0 follows the last step alone.
        limits: the least and the largest coefficient. Near balance the gradient of a balance loss vanishes, and no
            coefficient gives it a share.

    Raises ConfigError for a number out of its range.

    >>> import torch
    >>> Ratio(0.01, decay=0.5).after(torch.tensor([0.02]), torch.tensor([0.04]))  # 4 times the share: half of it, once
    tensor([0.0100])
    """

    share: float
    start: float = 1e-2
    decay: float = 0.9
    limits: tuple[float, float] = LIMITS

    def __post_init__(self) -> None:
        _check_number("a share of the language model's gradient above 0", self.share, "0.01 is 1 % of it")
        _check_range(self.start, self.limits)
        if not 0 <= self.decay < 1:
            raise ConfigError(expected="0 <= decay < 1", got=f"decay={self.decay}", do="0.9 averages about ten steps")

    def after(self, coef_L: Tensor, ratio_L: Tensor) -> Tensor:
        """(L,) the next coefficients; where a ratio is NaN, because nothing was measured, it stays."""
        return _moved(coef_L, self.share / ratio_L, LARGEST_RATIO_ERROR, 1 - self.decay, self.limits)


@dataclass(frozen=True)
class Target:
    """A coefficient that rises where MaxVio is above a wanted one, and falls where it is below.

    What is compared is the MaxVio of a step's whole load, of one layer; of a policy that sees groups or targets theirs.
    It is a ceiling: nothing unbalances a layer that is better. Where a larger coefficient helps no more, because it
    outweighs everything already or the gate is flat, it climbs to its limit; ``balance/signals`` tells.

    Args:
        maxvio: that is wanted, above 0. Below what chance shows (``functional.maxvio_noise_floor``) it is never met,
            and the coefficient rises to its limit.
        start: the coefficient of the first step.
        rate: by what power of the error a coefficient moves in a step; the error is clipped to e, so that it moves by
            at most a factor exp(rate). Loads answer late: a fast one swings.
        limits: the least and the largest coefficient.

    Raises ConfigError for a number out of its range.

    >>> import torch
    >>> Target(maxvio=0.1, rate=0.5).after(torch.tensor([0.02]), torch.tensor([0.025]))  # better than it has to be
    tensor([0.0121])
    """

    maxvio: float
    start: float = 1e-2
    rate: float = 0.02
    limits: tuple[float, float] = LIMITS

    def __post_init__(self) -> None:
        _check_number("a MaxVio above 0", self.maxvio, "0.1: the busiest expert has 10 % more than its share")
        _check_number("a rate above 0", self.rate, "0.02 moves a coefficient by at most 2 % a step")
        _check_range(self.start, self.limits)

    def after(self, coef_L: Tensor, maxvio_L: Tensor) -> Tensor:
        """(L,) the next coefficients; where a MaxVio is NaN, because nothing was measured, it stays."""
        return _moved(coef_L, maxvio_L / self.maxvio, LARGEST_TARGET_ERROR, self.rate, self.limits)


SelfSetting = Ratio | Target
SELF_SETTING = {"ratio": Ratio, "target": Target}  # in names: global:ratio@0.01


def _moved(coef_L: Tensor, error_L: Tensor, largest: float, gain: float, limits: tuple[float, float]) -> Tensor:
    moved_L = (coef_L * error_L.clamp(1 / largest, largest) ** gain).clamp(*limits)
    return torch.where(error_L == error_L, moved_L, coef_L)


def _check_number(expected: str, number: object, do: str) -> None:
    if not (isinstance(number, int | float) and 0 < number < float("inf")):
        raise ConfigError(expected=expected, got=repr(number), do=do)


def _check_range(start: object, limits: object) -> None:
    numbers = (*limits, start) if isinstance(limits, tuple | list) else ()
    if not (
        len(numbers) == 3
        and all(isinstance(number, int | float) for number in numbers)
        and 0 < numbers[0] <= numbers[2] <= numbers[1] < float("inf")
    ):
        raise ConfigError(
            expected="limits (least, largest) of a coefficient, above 0, and a start between them",
            got=f"limits={limits!r}, start={start!r}",
            do=f"leave both out for {LIMITS} and 1e-2",
        )
