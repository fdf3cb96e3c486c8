"""Rows of a table of factors such that every two values that may meet do meet: greedy, with a fixed seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Constraint", "Table"]

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


class Constraint(NamedTuple):
    """Values of ``factors`` that cannot be, and why."""

    factors: tuple[str, ...]
    impossible: Callable[..., bool]  # takes one value per factor
    reason: str


class Table:
    """Factors with their values, what cannot be combined, and what some values together cost (they multiply)."""

    def __init__(
        self,
        factors: Mapping[str, Sequence[Any]],
        constraints: Sequence[Constraint] = (),
        cost: Mapping[tuple[tuple[str, Any], ...], float] | None = None,
    ) -> None:
        self.factors, self.constraints, self.cost = dict(factors), list(constraints), dict(cost or {})

    def why_not(self, row: Row) -> str:
        """The reason why a row, or part of one, cannot be; empty where it can."""
        for factors, impossible, reason in self.constraints:
            if all(f in row for f in factors) and impossible(*(row[f] for f in factors)):
                return reason
        return ""

    def product(self) -> Iterator[Row]:
        """Every row that can be."""
        for values in itertools.product(*self.factors.values()):
            row = dict(zip(self.factors, values, strict=True))
            if not self.why_not(row):
                yield row

    def complete(self, row: Row, order: Sequence[str], prefer: Callable[[Row, str, Any], float]) -> Row | None:
        """Fills the missing factors in ``order``, the preferred values first; None where no completion exists."""
        missing = next((f for f in order if f not in row), None)
        if missing is None:
            return row
        for value in sorted(self.factors[missing], key=lambda v: -prefer(row, missing, v)):
            longer = row | {missing: value}
            if not self.why_not(longer) and (done := self.complete(longer, order, prefer)):
                return done
        return None

    def pairs(self) -> list[Pair]:
        """Every pair of values that some whole row contains."""
        found = []
        for a, b in itertools.combinations(self.factors, 2):
            for x, y in itertools.product(self.factors[a], self.factors[b]):
                row = {a: x, b: y}
                if not self.why_not(row) and self.complete(row, list(self.factors), lambda *_: 0.0):
                    found.append(((a, x), (b, y)))
        return found

    def rows(self, seed: int = 0, tries: int = 12) -> list[Row]:
        """Few and cheap rows that contain every pair of ``pairs()``."""
        rng = random.Random(seed)
        missing = dict.fromkeys(self.pairs())
        rows: list[Row] = []

        def gain(row: Row, factor: str, value: Any) -> float:
            new = sum(pair in missing for pair in _pairs_with(row, factor, value, self.factors))
            return (new + 0.5 * rng.random()) / self._cost(row | {factor: value})

        while missing:
            candidates = []
            for _ in range(tries):
                (a, x), (b, y) = rng.choice(list(missing))
                order = rng.sample(list(self.factors), len(self.factors))
                row = self.complete({a: x, b: y}, order, gain)
                assert row is not None
                candidates.append((len(missing.keys() & set(_pairs(row, self.factors))) / self._cost(row), row))
            best = max(candidates, key=lambda c: c[0])[1]
            best = {factor: best[factor] for factor in self.factors}
            rows.append(best)
            for pair in _pairs(best, self.factors):
                missing.pop(pair, None)
        return rows

    def _cost(self, row: Row) -> float:
        total = 1.0
        for items, factor in self.cost.items():
            total *= factor if all(row.get(f) == v for f, v in items) else 1.0
        return total


def _pairs(row: Row, factors: Mapping[str, Any]) -> Iterator[Pair]:
    return itertools.combinations([(f, row[f]) for f in factors], 2)


def _pairs_with(row: Row, factor: str, value: Any, factors: Mapping[str, Any]) -> Iterator[Pair]:
    order = list(factors)
    for other, its in row.items():
        mine, theirs = (factor, value), (other, its)
        yield (mine, theirs) if order.index(factor) < order.index(other) else (theirs, mine)
