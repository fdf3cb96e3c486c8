"""Inspections as plain text of at most 80 columns: a headline, and a line per measure with a column per inspection."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from ..data.formatting import clean, clip, number
from ..data.inspections import LAYER_COLUMNS, NamedInspection, headline_of, mean_of
from .table import align, wrap

__all__ = ["render_inspections"]

AT_ONCE = 3  # inspections side by side
NAME = 14  # the widest an inspection's name gets
LABELS, CELLS = 34, 15  # columns of text


def render_inspections(found: Sequence[NamedInspection]) -> str:
    """The headline, means over the layers of each inspection, and what could not be measured."""
    lines = [wrap(headline_of(found)), ""]
    for start in range(0, len(found), AT_ONCE):
        group = found[start : start + AT_ONCE]
        lines += [*align(list(_rows(group)), gaps=(0,), least=(LABELS, *[CELLS] * len(group))), ""]
    problems = [f"! {clean(one.name)}: {clean(problem)}" for one in found for problem in one.inspection.problems]
    lines += [wrap(problem, "  ") for problem in problems]
    return "\n".join(lines).rstrip("\n") + "\n"


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
