"""All numbers of a plan: every strategy on the cluster, and on clusters with more ranks per group."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..errors import ConfigError
from .cluster import Cluster
from .cost import Memory, StepTime, Work, memory, step_time, work
from .straggler import Straggler, straggler
from .typical_skews import Strategy

__all__ = ["EVEN", "Forecast", "Growth", "Row", "forecast", "growth_sizes", "to_json"]

EVEN = Straggler(1.0, 0.0, 0.0, 0.0, 0)


@dataclass(frozen=True)
class Row:
    """One strategy on one cluster. ``cost`` is its step time over that with even load and no balancer, minus 1."""

    name: str
    origin: str
    straggler: Straggler
    time: StepTime
    memory: Memory
    cost: float
    error: float  # standard error of cost


@dataclass(frozen=True)
class Growth:
    """The same strategies with ``ep`` ranks per group."""

    ep: int
    gpus: int
    replicas: int
    experts_per_rank: int
    rows: list[Row]


@dataclass(frozen=True)
class Forecast:
    """What ``equipoise plan`` shows."""

    cluster: Cluster
    work: Work
    even: StepTime
    rows: list[Row]
    growth: list[Growth]
    notes: list[str]
    seed: int


def forecast(cluster: Cluster, strategies: list[Strategy], *, up_to: int = 4096, seed: int = 0,
            notes: list[str] | None = None) -> Forecast:  # fmt: skip
    """Computes step time and memory of every strategy.

    Args:
        up_to: largest number of ranks per group in the growth table; 0 for no table.
        seed: of the simulation. notes: are passed on.

    Raises ConfigError without a strategy, or if recorded counts have another number of experts.
    """
    if not strategies:
        raise ConfigError(expected="at least one strategy", got="none", do="name one: --strategies micro,global")
    wider = [
        replace(cluster, ep=ep, gpus=_multiple(cluster.gpus, ep), replicas=max(1, ep // cluster.experts))
        for ep in growth_sizes(cluster.experts, up_to)
    ]
    # strategy by strategy: one draw of its shares is cached for all cluster sizes
    table = [[_row(on, one, seed) for on in (cluster, *wider)] for one in strategies]
    growth = [
        Growth(on.ep, on.gpus, on.replicas, on.experts_per_rank, [rows[i] for rows in table])
        for i, on in enumerate(wider, start=1)
    ]
    return Forecast(cluster, work(cluster), _even(cluster), [rows[0] for rows in table], growth, notes or [], seed)


def growth_sizes(experts: int, up_to: int) -> list[int]:
    """Ranks per group, each about twice the previous: divisors of the experts, then several ranks per expert.

    >>> growth_sizes(160, 1000), growth_sizes(8, 32)
    ([2, 4, 8, 16, 32, 80, 160, 320, 640], [2, 4, 8, 16, 32])
    """
    sizes: list[int] = []
    for ep in range(2, experts + 1):
        if experts % ep == 0 and (not sizes or ep >= 2 * sizes[-1] or ep == experts):
            sizes.append(ep)
    if len(sizes) > 1 and sizes[-1] < 1.5 * sizes[-2]:
        del sizes[-2]
    ep = 2 * experts
    while ep <= up_to:
        sizes.append(ep)
        ep *= 2
    return [ep for ep in sizes if ep <= up_to]


def to_json(plan: Forecast) -> dict[str, Any]:
    """The plan as plain data: seconds, bytes, fractions."""

    def row(one: Row) -> dict[str, Any]:
        return asdict(one) | {"step_seconds": one.time.total}

    return {
        "cluster": asdict(plan.cluster),
        "even_step_seconds": plan.even.total,
        "work_seconds_per_micro_batch": asdict(plan.work),
        "strategies": [row(one) for one in plan.rows],
        "growth": [asdict(one) | {"rows": [row(r) for r in one.rows]} for one in plan.growth],
        "notes": plan.notes,
        "seed": plan.seed,
    }


def _even(cluster: Cluster) -> StepTime:
    return replace(step_time(cluster, EVEN, counts=False), balance_sums=0.0)


def _row(cluster: Cluster, one: Strategy, seed: int) -> Row:
    factor = straggler(one.loads, cluster, seed=seed)
    time, even = step_time(cluster, factor, counts=one.counts), _even(cluster).total
    error = cluster.micro_batches * work(cluster).waited * factor.error / even
    return Row(one.name, one.origin, factor, time, memory(cluster, factor), time.total / even - 1, error)


def _multiple(gpus: int, ep: int) -> int:
    """``gpus`` rounded up to a multiple of ``ep``."""
    return math.ceil(gpus / ep) * ep
