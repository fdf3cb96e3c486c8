"""Loads of experts: a distribution of skewed shares fitted to two measured MaxVio, or recorded counts.

The text of all training uses expert e with share g_e; one source of text (a domain, a kind of document) uses it with
share q_se, whose mean over the sources is g. A balance loss over the global batch makes g even but not q; a loss over a
micro-batch makes q even, too. Shares are a softmax of normal logits, and ``Skew`` holds their two standard deviations.
A larger deviation raises every MaxVio, and it means the same for 16 experts as for 256.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError, DataError

__all__ = ["SOURCES", "Loads", "RecordedCounts", "Skew", "bisect", "expected_maxvio", "fit", "shares"]

Array = NDArray[np.floating]
SOURCES = 32  # kinds of text that sequences are drawn from
MOST = 2_000_000  # numbers in one table, which bounds the memory
STEEPEST = 8.0  # standard deviation of logits beyond which one expert gets everything
EVEN = 12  # iterations that make the mean over sources equal g


@dataclass(frozen=True)
class Batch:
    """What a group of ranks routes in one layer and micro-batch, and where its experts are."""

    experts: int
    parts: int  # expert shards, one per rank; ranks with copies of a shard split its tokens evenly
    ranks: int  # each with its own micro-batch
    sources: int  # single-source sequences in all micro-batches
    pairs: int  # (token, choice)
    placement: str = "contiguous"


class Loads(Protocol):
    """Draws the loads of the expert shards of a group."""

    def draw(self, seed: int, size: tuple[int, int], batch: Batch) -> Array:
        """Loads [layers, micro-batches, parts] of ``size`` = (layers, micro-batches); their sum is ``batch.pairs``."""
        ...


@dataclass(frozen=True)
class Skew:
    """How unevenly all text uses the experts, and how much more unevenly a single source does.

    >>> Skew(0.0, 0.0)
    Skew(corpus=0.0, source=0.0)
    """

    corpus: float = 0.0
    source: float = 0.0

    def draw(self, seed: int, size: tuple[int, int], batch: Batch) -> Array:
        rng = np.random.default_rng((seed, 1))
        shares_LSR = _by_part(_drawn(self, batch.experts, size[0], seed), batch)
        weights_LBS = rng.multinomial(batch.sources, np.full(SOURCES, 1 / SOURCES), size=size) / batch.sources
        p_LBR = weights_LBS @ shares_LSR
        return rng.multinomial(batch.pairs, p_LBR / p_LBR.sum(axis=-1, keepdims=True)).astype(float)


@dataclass(frozen=True, eq=False)
class RecordedCounts:
    """Counts [micro-batches, layers, experts], one micro-batch per rank.

    The load of a group is a sum of micro-batches drawn with replacement (a bootstrap), one per rank. Raises DataError
    for an array that does not hold counts.

    >>> RecordedCounts(np.ones((4, 2, 8))).counts_MLE.shape
    (4, 2, 8)
    """

    counts_MLE: Array

    def __post_init__(self) -> None:
        counts = np.asarray(self.counts_MLE, dtype=float)
        fault = None
        if counts.ndim != 3 or 0 in counts.shape:
            fault = f"an array of shape {counts.shape}"
        elif not np.isfinite(counts).all():
            fault = "NaN or infinity"
        elif (counts < 0).any():
            fault = f"a negative count, {counts.min():g}"
        elif (counts.sum(axis=-1) == 0).any():
            fault = "a micro-batch and layer whose counts are all zero"
        if fault:
            raise DataError(expected="counts [micro-batches, layers, experts] of (token, choice) pairs", got=fault,
                            do="save one row per micro-batch, layer and expert")  # fmt: skip
        object.__setattr__(self, "counts_MLE", counts)

    def draw(self, seed: int, size: tuple[int, int], batch: Batch) -> Array:
        """Sums of recorded micro-batches; layers beyond the recorded ones repeat them."""
        total, layers, recorded = self.counts_MLE.shape
        if recorded != batch.experts:
            raise ConfigError(expected=f"experts={recorded}, as recorded", got=f"experts={batch.experts}",
                              do=f"--set experts={recorded}, or give the record's MaxVio instead")  # fmt: skip
        shares_MLE = self.counts_MLE / self.counts_MLE.sum(axis=-1, keepdims=True)
        shares_LMR = _by_part(shares_MLE.transpose(1, 0, 2), batch)
        rng = np.random.default_rng((seed, 1))
        times_LBM = rng.multinomial(batch.ranks, np.full(total, 1 / total), size=size) / batch.ranks
        return batch.pairs * (times_LBM @ shares_LMR[np.arange(size[0]) % layers])


def shares(skew: Skew, experts: int, layers: int, rng: np.random.Generator) -> Array:
    """Draws shares q [layers, sources, experts] that sum to 1 and whose mean over sources is g.

    >>> q_LSE = shares(Skew(0.0, 1.0), experts=4, layers=1, rng=np.random.default_rng(0))
    >>> np.allclose(q_LSE.sum(-1), 1), bool(np.abs(q_LSE.mean(1) - 1 / 4).max() < 0.01)
    (True, True)
    """
    z_LE = skew.corpus * rng.standard_normal((layers, experts))
    g_LE = np.exp(z_LE - z_LE.max(axis=-1, keepdims=True))
    g_LE /= g_LE.sum(axis=-1, keepdims=True)
    z_LSE = skew.source * rng.standard_normal((layers, SOURCES, experts))
    q_LSE = g_LE[:, None] * np.exp(z_LSE - z_LSE.max(axis=-1, keepdims=True))
    for _ in range(EVEN if skew.source else 1):
        q_LSE *= (g_LE / q_LSE.mean(axis=1))[:, None]
        q_LSE /= q_LSE.sum(axis=-1, keepdims=True)
    return q_LSE


@functools.lru_cache(maxsize=1)
def _drawn(skew: Skew, experts: int, layers: int, seed: int) -> Array:
    """Shares for every number of ranks; read only."""
    return shares(skew, experts, layers, np.random.default_rng((seed, 0)))


def expected_maxvio(skew: Skew, experts: int, sources: int, pairs: int, *, seed: int = 0) -> float:
    """Mean MaxVio over ``pairs`` (token, choice) pairs of text from ``sources`` draws of a source.

    The noise of uniform routing is in it: with no skew it is about sqrt(2 ln experts * experts / pairs).

    >>> round(expected_maxvio(Skew(), experts=64, sources=1, pairs=64 * 2048), 2)
    0.05
    """
    layers = int(np.clip(MOST // (4 * SOURCES * experts), 4, 24))
    batch = Batch(experts, experts, 1, sources, pairs)
    loads_LBE = skew.draw(seed, (layers, 16), batch)
    return float((loads_LBE.max(axis=-1) / loads_LBE.mean(axis=-1)).mean() - 1)


def fit(batch: float, corpus: float, *, experts: int, sources: int, pairs: int, all_sources: int = 10_000,
        all_pairs: int = 10**9, top_k: int = 1, seed: int = 0) -> Skew:  # fmt: skip
    """Fits the skew whose MaxVio is ``batch`` over a micro-batch and ``corpus`` over all text.

    A MaxVio no larger than that of random routing gives no skew.

    Args:
        sources, pairs: single-source sequences and (token, choice) pairs that ``batch`` was measured over.
        all_sources, all_pairs: the same for ``corpus``.

    Raises ConfigError for a MaxVio below 0 or above experts / top_k - 1, where all tokens choose the same experts.

    >>> skew = fit(0.8, 0.1, experts=64, sources=1, pairs=32768)
    >>> round(expected_maxvio(skew, experts=64, sources=1, pairs=32768), 1)
    0.8
    """
    for value in (batch, corpus):
        if not 0 <= value <= experts / top_k - 1:
            raise ConfigError(expected=f"a MaxVio of 0 to {experts / top_k - 1:g} (every token picks one expert)",
                              got=f"{value:g}",
                              do="give max(counts) / mean(counts) - 1")  # fmt: skip
    skew = Skew()
    for _ in range(2):  # each number changes the MaxVio of the other a little

        def over_all(x: float, source: float = skew.source) -> float:
            return expected_maxvio(Skew(x, source), experts, all_sources, all_pairs, seed=seed)

        wide = _solve(over_all, corpus)

        def over_batch(x: float, wide: float = wide) -> float:
            return expected_maxvio(Skew(wide, x), experts, sources, pairs, seed=seed)

        skew = Skew(wide, _solve(over_batch, batch))
    return skew


def _solve(f: Callable[[float], float], target: float) -> float:
    """x in [0, STEEPEST] at which the increasing ``f`` reaches ``target``; 0 if it starts above."""
    if f(0.0) >= target:
        return 0.0
    low, high = 0.0, 1.0
    while f(high) < target and high < STEEPEST:
        low, high = high, 2 * high
    return bisect(f, target, low, high, rounds=10)


def bisect(f: Callable[[float], float], target: float, low: float, high: float, *, rounds: int = 15) -> float:
    """Where the increasing ``f`` reaches ``target``, by bisection; an end of the interval if it never does.

    >>> round(bisect(lambda x: x * x, 2.0, 0.0, 4.0, rounds=20), 4)
    1.4142
    """
    for _ in range(rounds):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < target else (low, middle)
    return (low + high) / 2


def _by_part(table_LXE: Array, batch: Batch) -> Array:
    """Sums over the experts of each shard, (L, X, parts)."""
    each = batch.experts // batch.parts
    if batch.placement == "strided":
        order = np.arange(batch.experts).reshape(each, batch.parts).T.ravel()
        table_LXE = table_LXE[..., order]
    elif batch.placement == "packed":
        order_LE = np.stack([_pack(load_E, batch.parts) for load_E in table_LXE.mean(axis=1)])
        table_LXE = np.take_along_axis(table_LXE, order_LE[:, None], axis=-1)
    return table_LXE.reshape(*table_LXE.shape[:-1], batch.parts, each).sum(axis=-1)


def _pack(load_E: Array, parts: int) -> NDArray[np.integer]:
    """Experts in order of their shard: the largest first, each to the least loaded shard with room."""
    each = len(load_E) // parts
    held: list[list[int]] = [[] for _ in range(parts)]
    load_R = np.zeros(parts)
    for expert in np.argsort(-load_E, kind="stable"):
        part = int(np.argmin(load_R))
        held[part].append(int(expert))
        load_R[part] = load_R[part] + load_E[expert] if len(held[part]) < each else np.inf
    return np.array(held).ravel()
