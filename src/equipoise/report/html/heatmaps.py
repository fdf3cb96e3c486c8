"""Heat maps as plain data, which the page draws on a canvas and a notebook with Plotly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.comparison import Comparison
from ..data.formatting import clean

__all__ = ["Map", "by_domain", "domain_maps", "heat_map", "load_maps", "top_of", "view"]

Map = dict[str, Any]  # {"views": [{"label", "z", "columns"?, "top"?, "unit"?}], "rows", "row", "cell", ...}


def heat_map(
    views: list[dict[str, Any]], rows: Sequence[str], *, top: float, row: str, cell: str = "expert",
    column: str = "expert", columns: Sequence[str] | None = None, scale: str = "ratio", unit: str = " × even",
) -> Map | None:  # fmt: skip
    """A figure with ``views``, of which a menu or slider shows one; None if there is nothing to draw.

    Args:
        row, cell: names of a row and a column in the tip of a cell ("layer 3, expert 7: 1.2 × even").
        column: title of the horizontal axis. scale: "ratio" (1 is even) or "amount" (0 is nothing).
    """
    if not views:
        return None
    made = {"views": views, "rows": [clean(one) for one in rows], "top": top, "row": row, "cell": cell,
            "column": column, "scale": scale, "unit": unit}  # fmt: skip
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
    """Labels of the slider, and for each strategy its layer × expert load with one view per label."""
    steps = sorted({m.step for m in _longest([one.charts.loads for one in comparison.strategies])})
    labels = [f"step {step}" if step else "held-out text" for step in steps]
    top = top_of([m.share for one in comparison.strategies for m in one.charts.loads[-1:]])
    figures = []
    for one in comparison.strategies:
        views = []
        for label, step in zip(labels, steps, strict=True):
            nearest = min(one.charts.loads, key=lambda m: abs(m.step - step), default=None)
            if nearest is not None:  # a run may have recorded loads at other steps, or be shorter
                views.append(view(f"step {nearest.step}" if nearest.step else label, nearest.share))
        rows = [str(layer) for layer in range(len(one.charts.loads[-1].share))] if views else []
        figures.append(heat_map(views, rows, top=top, row="layer"))
    return labels, figures


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
