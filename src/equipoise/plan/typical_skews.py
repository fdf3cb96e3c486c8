"""Balancing strategies with typical skews, for plans without recorded loads."""

from __future__ import annotations

from dataclasses import dataclass

from .loads import Loads, Skew

__all__ = ["SUMS_COUNTS", "TYPICAL", "Strategy", "needs_counts", "typical"]

# micro, and the skew of all text under `global`: 300 steps of the lab. The skew of sources under global and
# global+micro: implied by the step times of a 43 B model (calibration.py). loss-free: as global, with the published
# MaxVio of 0.04 over all text. none: 48 steps of the lab, and still growing. More in docs/plan.md.
TYPICAL: dict[str, Skew] = {
    "none": Skew(1.41, 0.85),
    "micro": Skew(0.188, 0.285),
    "global": Skew(0.12, 1.48),
    "global+micro": Skew(0.12, 0.81),
    "loss-free": Skew(0.016, 1.48),
}
SUMS_COUNTS = ("global", "shuffle")  # strategies whose loss needs the counts of all ranks within the step


@dataclass(frozen=True)
class Strategy:
    """A strategy, its loads, and their origin."""

    name: str
    loads: Loads
    origin: str = "typical"
    counts: bool = False  # whether the loads of all ranks are needed before a step ends


def typical() -> list[Strategy]:
    """The five strategies with typical loads.

    >>> [one.name for one in typical() if one.counts]
    ['global', 'global+micro']
    """
    return [Strategy(name, skew, counts=needs_counts(name)) for name, skew in TYPICAL.items()]


def needs_counts(name: str) -> bool:
    """Whether the loss of a strategy needs the counts of all ranks: ``previous`` and ``ema`` use earlier steps.

    >>> needs_counts("global:exact@0.02+micro"), needs_counts("global:ema"), needs_counts("loss-free@1e-2")
    (True, False, False)
    """
    return name.startswith(SUMS_COUNTS) and not any(estimator in name for estimator in (":previous", ":ema"))
