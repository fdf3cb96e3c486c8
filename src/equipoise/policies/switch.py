"""A policy that becomes another one at a step: warm-up, freezing, and the switch experiment of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigError
from .expert_bias import ExpertBias
from .losses import AuxLoss, ZLoss

__all__ = ["Policy", "Switch", "Timed", "losses_at", "timeline"]


@dataclass(frozen=True)
class Switch:
    """``first`` before step ``at`` (0 = first step), ``to`` from then on; None on either side is no policy.

    ``Switch(at=20_000, to=AuxLoss("micro_batch", 1e-4))`` adds a policy late (arXiv 2501.11873, table 5);
    ``Switch(at=10_000, first=AuxLoss("micro_batch"), to=AuxLoss("global_batch"))`` is its table 3.

    >>> Switch(at=10, to=ZLoss()).first is None
    True
    """

    at: int
    to: Policy | None
    first: Policy | None = None

    def __post_init__(self) -> None:
        if not (isinstance(self.at, int) and self.at >= 0):
            raise ConfigError(
                expected="Switch(at=step) with a whole step >= 0",
                got=f"at={self.at!r}",
                do="count optimizer steps from 0",
            )
        for side in (self.to, self.first):
            if not isinstance(side, AuxLoss | ZLoss | ExpertBias | Switch | None):
                raise ConfigError(
                    expected="a policy or None on each side of a Switch",
                    got=repr(side),
                    do="pass AuxLoss, ZLoss, ExpertBias or another Switch",
                )


Policy = AuxLoss | ZLoss | ExpertBias | Switch


@dataclass(frozen=True)
class Timed:
    """A policy without switches and the steps [start, end) at which it acts; ``index`` is its place in the list."""

    policy: AuxLoss | ZLoss | ExpertBias
    index: int
    start: int = 0
    end: int | None = None

    def active(self, step: int) -> bool:
        return self.start <= step and (self.end is None or step < self.end)


def timeline(policies: Sequence[Policy]) -> list[Timed]:
    """Flattens a policy list, so that a switch needs no code anywhere else.

    >>> [(t.start, t.end) for t in timeline([Switch(at=5, to=ZLoss(), first=ZLoss(0.1)), ZLoss()])]
    [(0, 5), (5, None), (0, None)]
    """
    flat: list[Timed] = []
    for index, policy in enumerate(policies):
        flat += _flatten(policy, index, 0, None)
    return flat


def losses_at(timeline: Sequence[Timed], step: int) -> list[AuxLoss]:
    """The balance losses that act at a step.

    >>> losses_at(timeline([Switch(at=5, to=AuxLoss()), ZLoss()]), 4)
    []
    """
    return [timed.policy for timed in timeline if isinstance(timed.policy, AuxLoss) and timed.active(step)]


def _flatten(policy: Policy | None, index: int, start: int, end: int | None) -> list[Timed]:
    match policy:
        case None:
            return []
        case Switch(at, to, first):
            until = at if end is None else min(at, end)
            before = _flatten(first, index, start, until) if until > start else []
            after = _flatten(to, index, max(at, start), end) if end is None or max(at, start) < end else []
            return before + after
        case AuxLoss() | ZLoss() | ExpertBias():
            return [Timed(policy, index, start, end)]
    raise ConfigError(
        expected="policies: AuxLoss, ZLoss, ExpertBias or Switch",
        got=repr(policy),
        do='for example [AuxLoss(scope="global_batch", coef=1e-2)]',
    )
