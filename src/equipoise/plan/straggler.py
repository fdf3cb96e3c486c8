"""Load of the slowest rank of a group over the mean load, by simulation, with its standard error."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .cluster import Cluster
from .loads import Batch, Loads

__all__ = ["Straggler", "batch_of", "slowest", "straggler"]

CELLS = 400_000  # loads in one simulation, which bounds time and memory
SOURCE_CELLS = 4_000_000  # the same for the shares of all sources
LAYERS, BATCHES = 64, 32  # at most; fewer for very many ranks, whose largest load varies less


@dataclass(frozen=True)
class Straggler:
    """The factor F = largest load of a rank / mean load in a layer and micro-batch; 1 is even.

    ``spread`` is the standard deviation of F over micro-batches of one layer, ``rank_spread`` that of the load of any
    rank over the mean. ``error`` is the standard error of ``mean`` over drawn or recorded layers.
    """

    mean: float
    error: float
    spread: float
    rank_spread: float
    draws: int


def batch_of(cluster: Cluster) -> Batch:
    """What a group of ``cluster.ep`` ranks routes in one layer and micro-batch."""
    return Batch(cluster.experts, cluster.parts, cluster.ep, cluster.sources, cluster.pairs, cluster.placement)


def straggler(loads: Loads, cluster: Cluster, *, seed: int = 0) -> Straggler:
    """Simulates micro-batches of one group of ranks.

    >>> from .loads import Skew
    >>> even, skewed = (straggler(Skew(0.0, s), Cluster()) for s in (0.0, 1.0))
    >>> 1.0 < even.mean < 1.02 < skewed.mean
    True
    """
    relative_LBR = _relative(loads, cluster, seed)
    factor_LB = relative_LBR.max(axis=-1)
    by_layer = factor_LB.mean(axis=1)
    return Straggler(
        mean=float(factor_LB.mean()),
        error=float(by_layer.std(ddof=1) / math.sqrt(len(by_layer))),
        spread=float(np.sqrt(factor_LB.var(axis=1, ddof=1).mean())),
        rank_spread=float(relative_LBR.std()),
        draws=factor_LB.size,
    )


def slowest(loads: Loads, cluster: Cluster, *, seed: int = 0) -> NDArray[np.floating]:
    """(L, B): F of each layer and micro-batch of the same simulation.

    >>> from .loads import Skew
    >>> one = slowest(Skew(0.0, 1.0), Cluster())
    >>> float(one.mean()) == straggler(Skew(0.0, 1.0), Cluster()).mean
    True
    """
    return _relative(loads, cluster, seed).max(axis=-1)


def _relative(loads: Loads, cluster: Cluster, seed: int) -> NDArray[np.floating]:
    """(L, B, R): load of each rank over the mean of the ranks."""
    batch = batch_of(cluster)
    layers = int(np.clip(SOURCE_CELLS // (32 * batch.experts), 8, LAYERS))
    batches = int(np.clip(CELLS // (layers * batch.parts), 4, BATCHES))
    loads_LBR = loads.draw(seed, (layers, batches), batch)
    return loads_LBR / loads_LBR.mean(axis=-1, keepdims=True)
