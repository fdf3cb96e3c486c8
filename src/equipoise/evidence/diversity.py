"""How unlike all text a balance batch is, from the text alone: what a balance loss over it has to even out in vain.

A loss over few sequences of one kind asks that these few use all experts alike; over a batch as mixed as all text it
asks nothing of any kind of text. How unlike a batch is, is here the squared distance between its token shares and those
of all text, over the squared length of the latter, without what drawing so few tokens alone would give:

    gap = E |p_batch - p|² / |p|²,   |p_batch|² estimated as (n |q|² - 1) / (n - 1) from the shares q of n tokens

`diversity_gap` draws batches, as the claims have it; `diversity_of` gives the mean of all draws in closed form, for
batches of any size: shares of independent draws differ by their variance within and between domains, over their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import ConfigError
from ..lab.data.packing import PackedData

__all__ = ["Diversity", "Gap", "diversity_gap", "diversity_of"]

DRAWS = 2000
MOST_WINDOWS = 4096  # of a domain


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
    size = _size(sequences, per_micro_batch, mixed, draws)
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


class Diversity(NamedTuple):
    """What the gap of any balance batch of a text follows from, domains counting alike.

    Args:
        square: |p|² of all text.
        between: mean over domains of |p_domain - p|².
        within: mean over domains of the mean over their windows of |q_window - p_domain|².
        within_error: its standard error, windows being a sample.
        tokens: in a window.
        windows: in all, of which fewer than twice `MOST_WINDOWS` of a domain were looked at.
    """

    square: float
    between: float
    within: float
    within_error: float
    tokens: int
    windows: int

    def gap(self, sequences: int, *, per_micro_batch: int = 1, mixed: bool = False) -> Gap:
        """What `diversity_gap` would give after endless draws, with the error of the windows instead of the draws'.

        Args and errors as there.

        >>> text = Diversity(square=0.1, between=0.05, within=0.0, within_error=0.0, tokens=256, windows=100)
        >>> [round(text.gap(n, mixed=True).value, 2) for n in (1, 2, 10)]
        [0.47, 0.23, 0.05]
        """
        size = _size(sequences, per_micro_batch, mixed)
        n = sequences * self.tokens
        spread = (self.between * size + self.within) / sequences
        square = (n * (self.square + spread) - 1) / (n - 1)
        return Gap((square - self.square) / self.square, self.within_error / sequences / self.square)


def diversity_of(data: PackedData) -> Diversity:
    """The variances that the gaps of a text follow from. Raises ConfigError for windows of a single token.

    >>> from pathlib import Path
    >>> rows = {"a": np.zeros((8, 5), np.uint16), "b": np.ones((8, 5), np.uint16)}
    >>> text = diversity_of(PackedData(["a", "b"], "", 300, rows, rows, {}, Path()))
    >>> text.gap(1).value, text.gap(2, mixed=True).value < text.gap(2, per_micro_batch=2).value
    (1.0, True)
    """
    if data.sequence_length < 2:
        raise ConfigError(expected="windows of 2 tokens or more", got="1", do="choose a greater length")
    means, within, errors = [], [], []
    for name in data.domains:
        rows = _looked_at(data.train[name])
        count, length = rows.shape
        mean_V = np.bincount(rows.ravel(), minlength=data.vocab_size) / rows.size
        keys, times = np.unique(rows + data.vocab_size * np.arange(count)[:, None], return_counts=True)
        squares_N = np.bincount(keys // data.vocab_size, weights=times.astype(np.float64) ** 2) / length**2
        away_N = np.maximum(squares_N - 2 * mean_V[rows].mean(axis=1) + mean_V @ mean_V, 0)
        means.append(mean_V)
        within.append(away_N.mean())
        errors.append(away_N.var(ddof=1) / count if count > 1 else 0.0)
    mean_V = np.mean(means, axis=0)
    between = float(np.mean([(one - mean_V) @ (one - mean_V) for one in means]))
    error = float(np.sqrt(np.sum(errors)) / len(errors))
    windows = sum(len(data.train[name]) for name in data.domains)
    return Diversity(float(mean_V @ mean_V), between, float(np.mean(within)), error, data.sequence_length, windows)


def _size(sequences: int, per_micro_batch: int, mixed: bool, draws: int = 1) -> int:
    """The neighbouring sequences that are drawn together."""
    size = 1 if mixed else per_micro_batch
    if min(sequences, per_micro_batch, draws) < 1 or (sequences % size and sequences > size):
        raise ConfigError(
            expected="a balance batch of whole micro-batches",
            got=f"{sequences} sequences, {per_micro_batch} in a micro-batch, {draws} draws",
            do="take a multiple of the micro-batch",
        )
    return min(size, sequences)


def _looked_at(rows: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(windows, tokens) int64: some windows, evenly spread, stand for all."""
    rows = np.asarray(rows)
    return rows[:: max(1, len(rows) // MOST_WINDOWS)][:, :-1].astype(np.int64)


def _counts(rows: Sequence[np.ndarray] | np.ndarray, vocabulary: int) -> np.ndarray:
    """(rows, vocabulary) how often each token is in each window."""
    rows = _looked_at(rows)
    flat = rows + vocabulary * np.arange(len(rows))[:, None]
    counted = np.bincount(flat.ravel(), minlength=vocabulary * len(rows))
    return counted.reshape(len(rows), vocabulary).astype(np.float64)
