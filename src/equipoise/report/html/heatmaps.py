"""Heat maps as plain data, which the page draws on a canvas and a notebook with Plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.comparison import Comparison, StrategySummary
from ..data.formatting import clean
from ..data.groups import Grouping

__all__ = ["Map", "by_domain", "domain_maps", "group_maps", "heat_map", "load_maps", "top_of", "view"]

Map = dict[str, Any]  # {"views": [{"label", "z", "columns"?, "top"?, "unit"?}], "rows", "row", "cell", "borders"?, ...}


def heat_map(
    views: list[dict[str, Any]], rows: Sequence[str], *, top: float, row: str, cell: str = "expert",
    column: str = "expert", columns: Sequence[str] | None = None, scale: str = "ratio", unit: str = " × even",
    borders: Sequence[int] = (),
) -> Map | None:  # fmt: skip
    """A figure with ``views``, of which a menu or slider shows one; None if there is nothing to draw.

    Args:
        row, cell: names of a row and a column in the tip of a cell ("layer 3, expert 7: 1.2 × even").
        column: title of the horizontal axis. scale: "ratio" (1 is even) or "amount" (0 is nothing).
        borders: columns before which a line is drawn.
    """
    if not views:
        return None
    made = {"views": views, "rows": [clean(one) for one in rows], "top": top, "row": row, "cell": cell,
            "column": column, "scale": scale, "unit": unit}  # fmt: skip
    made |= {"borders": list(borders)} if borders else {}
    return made | ({"columns": [clean(one) for one in columns]} if columns is not None else {})


def view(label: str, cells: Any, *, places: int = 2, **more: Any) -> dict[str, Any]:
    """One view with ``cells`` (R, C); cells that are not finite become None, shown as not measured.

    >>> view("layer 0", [[1.234, float("nan")]])
    {'label': 'layer 0', 'z': [[1.23, None]]}
    """
    array = np.round(np.asarray(cells, dtype=np.float64), places)
    z = [[value if math.isfinite(value) else None for value in row] for row in array.tolist()]
    return {"label": clean(label), "z": z} | {key: value for key, value in more.items() if value is not None}


def top_of(maps: Sequence[Any], least: float = 2.0) -> float:
    """Top of the colour scale: the 99.5 % quantile, so that one hot expert does not wash out the rest."""
    cells = np.concatenate([np.ravel(np.asarray(one, dtype=np.float64)) for one in maps]) if maps else np.array([])
    cells = cells[np.isfinite(cells)]
    return max(least, math.ceil(float(np.quantile(cells, 0.995)) * 2) / 2) if cells.size else least


def load_maps(comparison: Comparison) -> tuple[list[str], list[Map | None]]:
    """Labels of the slider, and for each strategy its layer × expert load with one view per label.

    Experts of a group stand side by side, between lines: the strategy's own groups, else those of another.
    """
    steps = sorted({m.step for m in _longest([one.charts.loads for one in comparison.strategies])})
    labels = [f"step {step}" if step else "held-out text" for step in steps]
    top = top_of([m.share for one in comparison.strategies for m in one.charts.loads[-1:]])
    figures = []
    for one in comparison.strategies:
        views, grouping = [], _grouping(one)
        order = grouping.order if grouping else []
        plain = order == sorted(order)
        for label, step in zip(labels, steps, strict=True):
            nearest = min(one.charts.loads, key=lambda m: abs(m.step - step), default=None)
            if nearest is not None:  # a run may have recorded loads at other steps, or be shorter
                label = f"step {nearest.step}" if nearest.step else label
                share = nearest.share if plain else np.asarray(nearest.share)[:, order]
                views.append(view(label, share, columns=None if plain else order))
        rows = [str(layer) for layer in range(len(one.charts.loads[-1].share))] if views else []
        column = "expert" if plain else "experts, group by group"
        borders = grouping.starts if grouping else []
        figures.append(heat_map(views, rows, top=top, row="layer", column=column, borders=borders))
    return labels, figures


def group_maps(comparison: Comparison) -> tuple[list[str], list[Map | None]]:
    """Labels of the menu, a grouping of experts each, and for each strategy its layer × group load at the end."""
    of_strategies = [{one.grouping: one.share for one in each.charts.groups} for each in comparison.strategies]
    known = list(dict.fromkeys(grouping for found in of_strategies for grouping in found))
    top = top_of([share.share for found in of_strategies for share in found.values()])
    figures = []
    for found in of_strategies:
        views = [view(grouping.name, share.share) for grouping in known if (share := found.get(grouping)) is not None]
        rows = [str(layer) for layer in range(max((len(one["z"]) for one in views), default=0))]
        figures.append(heat_map(views, rows, top=top, row="layer", cell="group", column="group", unit=" × its share"))
    return [grouping.name for grouping in known], figures


def _grouping(one: StrategySummary) -> Grouping | None:
    """None also where its groups are not of the experts that were recorded."""
    known = [*([one.charts.grouping] if one.charts.grouping else []), *(found.grouping for found in one.charts.groups)]
    experts = len(one.charts.loads[-1].share[0]) if one.charts.loads else 0
    return next((grouping for grouping in known if len(grouping.order) == experts), None)


def domain_maps(comparison: Comparison) -> tuple[list[str], list[Map | None]]:
    """`load_maps` for expert × domain: one view per layer, experts ordered by the domain that they favour."""
    layers = _longest([one.charts.layers for one in comparison.strategies])
    labels = [f"layer {layer}" for layer in layers]
    top = top_of([share for one in comparison.strategies for share in one.charts.domain_share])
    figures = []
    for one in comparison.strategies:
        views = [by_domain(f"layer {layer}", share)
                 for layer, share in zip(one.charts.layers, one.charts.domain_share, strict=True)]  # fmt: skip
        rows = list(one.domain_perplexity)  # of this strategy: other runs may have other domains
        figures.append(heat_map(views, rows, top=top, row="domain", column="experts, by the domain they favour"))
    return labels, figures


def by_domain(label: str, share: Any) -> dict[str, Any]:
    """A view of one layer, domain × expert, with the experts ordered by the domain that they favour."""
    array = np.asarray(share, dtype=np.float64)
    order = np.lexsort((-array.max(axis=0), array.argmax(axis=0)))
    return view(label, array[:, order], columns=order.tolist())


def _longest(lists: Sequence[list[Any]]) -> list[Any]:
    return max(lists, key=len, default=[])
