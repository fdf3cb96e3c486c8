"""Inspections as plain text of at most 80 columns: a headline, and a line per measure with a column per inspection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..data.checkpoints import LAYER_MEASURES, Series, headline_with_time, in_full, over_training, series_of
from ..data.formatting import clean, clip, number
from ..data.inspections import LAYER_COLUMNS, NamedInspection, mean_of
from .table import align, table, wrap

__all__ = ["render_inspections"]

AT_ONCE = 3  # inspections side by side
NAME = 14  # the widest an inspection's name gets
LABELS, CELLS = 34, 15  # columns of text
TIME = {
    "MaxVio": "MaxVio, all text", "sequence": "MaxVio, sequence", "information": "Domain information, nats",
    "dead": "Dead experts, all layers", "churn": "Routing churn since the checkpoint before",
    "most alike": "Likeness of two experts' weights, the most alike", "top-K": "Top-K score",
}  # fmt: skip


def render_inspections(found: Sequence[NamedInspection]) -> str:
    """The headline, means over the layers of each inspection, and what could not be measured."""
    lines = [wrap(headline_with_time(found)), ""]
    lines += [line for series in series_of(found) for line in (_through_training(series), "")]
    full = in_full(found)
    for start in range(0, len(full), AT_ONCE):
        group = full[start : start + AT_ONCE]
        lines += [*align(list(_rows(group)), gaps=(0,), least=(LABELS, *[CELLS] * len(group))), ""]
    problems = [f"! {clean(one.name)}: {clean(problem)}" for one in found for problem in one.inspection.problems]
    lines += [wrap(problem, "  ") for problem in problems]
    return "\n".join(lines).rstrip("\n") + "\n"


def _through_training(series: Series) -> str:
    """A line a checkpoint, means over the layers; what nothing is known of has no column."""
    named = {measure.label: measure for measure in LAYER_MEASURES}
    heads = {heading: named[label] for heading, label in TIME.items() if np.isfinite(series.values(named[label])).any()}
    rows = [[f"{step:,}"] for step in series.steps]
    for measure in heads.values():
        curve, _ = over_training(series, measure)
        known = dict(zip(curve.steps, curve.mean, strict=True)) if curve else {}
        for row, step in zip(rows, series.steps, strict=True):
            row.append(number(known.get(step), measure.places))
    return table(f"{clip(clean(series.name), 40)} through training", ["step", *heads], rows)


def _rows(group: Sequence[NamedInspection]) -> Iterator[list[str]]:
    yield ["Mean over layers (chance)", *(clip(clean(one.name), NAME) for one in group)]
    for column in LAYER_COLUMNS:
        cells = []
        for one in group:
            value, floor = mean_of(one.inspection, column), mean_of(one.inspection, column, floor=True)
            chance = f" ({number(floor, column.places)})" if math.isfinite(floor) else ""
            cells.append(f"{number(value, column.places)}{chance}")
        yield [column.label, *cells]
    count: tuple[tuple[str, Callable[..., int]], ...] = (
        ("Dead experts", lambda layer: len(layer.dead)),
        ("Idle experts", lambda layer: len(layer.idle)),
    )
    for label, read in count:
        yield [label, *(str(sum(map(read, one.inspection.layers))) for one in group)]
