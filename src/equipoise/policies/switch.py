"""A policy that becomes another one at a step: warm-up, freezing, and the switch experiment of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import ConfigError
from .expert_bias import ExpertBias
from .losses import AuxLoss, EntropyLoss, ZLoss

__all__ = ["Policy", "Switch"]


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
            if not isinstance(side, AuxLoss | EntropyLoss | ZLoss | ExpertBias | Switch | None):
                raise ConfigError(
                    expected="a policy or None on each side of a Switch",
                    got=repr(side),
                    do="pass AuxLoss, EntropyLoss, ZLoss, ExpertBias or another Switch",
                )


Policy = AuxLoss | EntropyLoss | ZLoss | ExpertBias | Switch
