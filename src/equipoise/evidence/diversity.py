"""How unlike all text a balance batch is, from the text alone: what a balance loss over it has to even out in vain.

A loss over few sequences of one kind asks that these few use all experts alike; over a batch as mixed as all text it
asks nothing of any kind of text. How unlike a batch is, is here the squared distance between its token shares and those
of all text, over the squared length of the latter, without what drawing so few tokens alone would give:

    gap = E |p_batch - p|² / |p|²,   |p_batch|² estimated as (n |q|² - 1) / (n - 1) from the shares q of n tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from ..lab.data.packing import PackedData

__all__ = ["Gap", "diversity_gap"]

DRAWS = 2000


class Gap(NamedTuple):
    """A mean over draws of balance batches, and its standard error."""

    value: float
    error: float


def diversity_gap(
    data: PackedData,
    sequences: int,
    *,
    per_micro_batch: int = 1,
    mixed: bool = False,
    draws: int = DRAWS,
    seed: int = 0,
) -> Gap:
    """The gap of balance batches of so many sequences, drawn as training draws them.

    Args:
        sequences: in a balance batch: those of a micro-batch, of all ranks, of the whole step.
        per_micro_batch: neighbouring sequences of one domain; ``mixed``: each sequence of any domain instead.
        draws: balance batches.

    Raises ConfigError for numbers below 1, and for a balance batch that cuts a micro-batch.

    >>> from pathlib import Path
    >>> rows = {"a": np.zeros((8, 5), np.uint16), "b": np.ones((8, 5), np.uint16)}
    >>> data = PackedData(["a", "b"], "", 300, rows, rows, {}, Path())
    >>> diversity_gap(data, 1).value, diversity_gap(data, 1, mixed=True).value  # one token or the other, never both
    (1.0, 1.0)
    >>> diversity_gap(data, 64).value < 0.05
    True
    """
    size = 1 if mixed else per_micro_batch
    if min(sequences, per_micro_batch, draws) < 1 or (sequences % size and sequences > size):
        raise ConfigError(
            expected="a balance batch of whole micro-batches",
            got=f"{sequences} sequences, {per_micro_batch} in a micro-batch, {draws} draws",
            do="take a multiple of the micro-batch",
        )
    size = min(size, sequences)
    rng = np.random.default_rng(seed)
    tables = [_counts(data.train[name], data.vocab_size) for name in data.domains]
    mean_V = np.mean([table.sum(axis=0) / table.sum() for table in tables], axis=0)
    length = float(mean_V @ mean_V)
    gaps = np.empty(draws)
    for draw in range(draws):
        counts_V = np.zeros(data.vocab_size)
        for _ in range(sequences // size):
            table = tables[rng.integers(len(tables))]
            counts_V += table[rng.integers(len(table), size=size)].sum(axis=0)
        n, shares_V = counts_V.sum(), counts_V / counts_V.sum()
        square = (n * float(shares_V @ shares_V) - 1) / (n - 1)
        gaps[draw] = (square - 2 * float(shares_V @ mean_V) + length) / length
    return Gap(float(gaps.mean()), float(gaps.std(ddof=1) / draws**0.5) if draws > 1 else float("nan"))


def _counts(rows: Sequence[np.ndarray] | np.ndarray, vocabulary: int) -> np.ndarray:
    """(rows, vocabulary) how often each token is in each window; at most 4096 windows, evenly spread, stand for all."""
    rows = np.asarray(rows)
    rows = rows[:: max(1, len(rows) // 4096)][:, :-1].astype(np.int64)
    flat = rows + vocabulary * np.arange(len(rows))[:, None]
    counted = np.bincount(flat.ravel(), minlength=vocabulary * len(rows))
    return counted.reshape(len(rows), vocabulary).astype(np.float64)
