"""Whether one law gives the gain of every cell: fitted to all, judged by the cells that it did not see.

Each cell says how unlike all text its two balance batches are, before any run (`diversity.diversity_gap`), and gets a
mean difference with its standard error from its pairs. A law turns the two gaps into one number x and says
difference = c · x; c is fitted by least squares, each cell by the inverse of its squared error.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import stdev
from typing import NamedTuple

from scipy import stats

from .verdict import LEVEL, ClaimVerdict

__all__ = ["HEADS", "LAWS", "Cell", "Fit", "cells_of", "fit_laws", "holding", "law_rows", "law_words"]

LAWS: dict[str, tuple[str, Callable[[float, float], float]]] = {
    "proportional": ("c (gap before - gap after)", lambda before, after: before - after),
    "logarithmic": ("c ln(gap before / gap after)", lambda before, after: math.log(before / after)),
    "constant": ("c", lambda _before, _after: 1.0),
    "nothing": ("0", lambda _before, _after: 0.0),
}
HEADS = ("law", "difference", "c (standard error)", "lack of fit, p", "unseen error")
SIGMAS = 2.0  # how far from zero a coefficient is, in standard errors; without it noise alone passes one time in five
TRIVIAL = ("constant", "nothing")  # what a law of diversity has to beat


class Cell(NamedTuple):
    """The gaps before and after the scope is widened, the mean difference, its standard error, its pairs."""

    name: str
    before: float
    after: float
    mean: float
    error: float
    pairs: int


class Fit(NamedTuple):
    """A law after its fit to all cells.

    ``lack`` is the p-value of its lack of fit: each cell's residual in standard errors, read in Student's t of that
    cell's pairs as a normal deviate, and the sum of their squares in chi-square. ``left_out`` is the root mean square
    of the residuals of cells that the fit was made without, in the unit of the differences.
    """

    law: str
    coefficient: float
    error: float
    lack: float
    left_out: float


def cells_of(one: ClaimVerdict) -> list[Cell]:
    """The contrasts of a claim that state their gaps and have two pairs or more."""
    found = []
    for judged in one.judged:
        known, gaps = judged.difference, judged.contrast.gaps
        if gaps and known and known.n > 1 and (spread := stdev(known.by_seed.values())) > 0:
            (before, after), error = gaps, spread / math.sqrt(known.n)
            found.append(Cell(judged.contrast.cell, before, after, known.mean, error, known.n))
    return found


def fit_laws(cells: Sequence[Cell]) -> list[Fit]:
    """Every law, the best at cells it did not see first; none with fewer than three cells.

    >>> cells = [Cell(str(x), x, 0.5, -0.02 * (x - 0.5), 0.001, 8) for x in (1.0, 2.0, 3.0)]
    >>> best = fit_laws(cells)[0]
    >>> best.law, round(best.coefficient, 6), round(best.lack, 6)
    ('proportional', -0.02, 1.0)
    """
    if len(cells) < 3:
        return []
    return sorted((_fit(name, cells) for name in LAWS), key=lambda fit: fit.left_out)


def holding(fits: Sequence[Fit]) -> Fit | None:
    """The law that holds: not rejected, told from nothing, and at cells it did not see better than a trivial one."""
    trivial = min((fit.left_out for fit in fits if fit.law in TRIVIAL), default=math.inf)
    of_diversity = [fit for fit in fits if fit.law not in TRIVIAL and abs(fit.coefficient) > SIGMAS * fit.error]
    return next((fit for fit in of_diversity if fit.lack > LEVEL and fit.left_out < trivial), None)


def law_rows(fits: Sequence[Fit]) -> list[list[str]]:
    """A row under `HEADS` for every law."""
    return [
        [fit.law, LAWS[fit.law][0], f"{fit.coefficient:+.4f} ({fit.error:.4f})" if fit.error else "",
         f"{fit.lack:.2g}", f"{fit.left_out:.4f}"]
        for fit in fits
    ]  # fmt: skip


def law_words(one: ClaimVerdict, cells: Sequence[Cell], fits: Sequence[Fit]) -> str:
    """Which law holds, or that none does, in a sentence or two; before all pairs of its cells are in, neither."""
    stated = [judged for judged in one.judged if judged.contrast.gaps]
    done = [judged for judged in stated if judged.difference and judged.difference.n == judged.contrast.seeds]
    found = holding(fits)
    if len(done) < len(stated):
        said = f"No law is judged yet: {len(done)} of {len(stated)} cells have all their pairs."
    elif found:
        said = f"The {found.law} law holds in these {len(cells)} cells."
    else:
        said = f"No law of diversity holds in these {len(cells)} cells."
    noise = math.sqrt(math.fsum(cell.error**2 for cell in cells) / len(cells))
    return (
        f"{said} A law holds where its lack of fit is above {LEVEL}, its coefficient {SIGMAS:.0f} standard errors "
        "from zero, and its error at unseen cells (root mean square, each cell predicted from the others) below those "
        f"of one number for all cells and of none. The means themselves are known to {noise:.4f}."
    )


def _fit(name: str, cells: Sequence[Cell]) -> Fit:
    x = [LAWS[name][1](cell.before, cell.after) for cell in cells]
    coefficient, error = _least_squares(x, cells)
    deviates = []
    for at, cell in zip(x, cells, strict=True):
        tail = float(stats.t.sf(abs(cell.mean - coefficient * at) / cell.error, cell.pairs - 1))
        deviates.append(float(stats.norm.isf(tail)))
    degrees = len(cells) - (name != "nothing")
    lack = float(stats.chi2.sf(math.fsum(one * one for one in deviates), degrees))
    missed = []
    for out, cell in enumerate(cells):
        others = [at for at in range(len(cells)) if at != out]
        without, _ = _least_squares([x[at] for at in others], [cells[at] for at in others])
        missed.append((cell.mean - without * x[out]) ** 2)
    return Fit(name, coefficient, error, lack, math.sqrt(math.fsum(missed) / len(missed)))


def _least_squares(x: Sequence[float], cells: Sequence[Cell]) -> tuple[float, float]:
    """(c, its standard error)."""
    weight = [at / cell.error**2 for at, cell in zip(x, cells, strict=True)]
    square = math.fsum(one * at for one, at in zip(weight, x, strict=True))
    if square == 0:
        return 0.0, 0.0
    return math.fsum(one * cell.mean for one, cell in zip(weight, cells, strict=True)) / square, square**-0.5
