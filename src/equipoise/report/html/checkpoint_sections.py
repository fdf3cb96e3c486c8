"""The sections of the page about checkpoints of one model: its measures, layers and experts through training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.checkpoints import LAYER_MEASURES, Series, left_out, over_training, series_of
from ..data.curves import thin
from ..data.formatting import number
from ..data.inspections import NamedInspection
from .figures import over_checkpoints
from .heatmaps import Map, heat_map, top_of, view
from .widgets import Cell, Part, Section, Widgets, table

__all__ = ["checkpoint_sections"]

MOST_CELLS = 400_000  # of loads through training; beyond it layers are left out, evenly spaced


def checkpoint_sections(found: Sequence[NamedInspection], widgets: Widgets) -> list[Section]:
    """None where no two inspections are of one model at different steps."""
    series = series_of(found)
    return [_measures(series, widgets), _loads(series, widgets)] if series else []


def _measures(series: Sequence[Series], widgets: Widgets) -> Section:
    title = "Through training"
    choices = []
    for measure in LAYER_MEASURES:
        curves = []
        for one in series:
            curve, floor = over_training(one, measure)
            curves.append((one.name, one.colour, curve, floor, measure.floor.chance if measure.floor else ""))
        choices.append((measure.label, curves))
    figure = over_checkpoints(choices)
    lead = (
        "Inspections of one model at several steps, in the order of training; dotted: what chance gives. Routing churn "
        "is the share of choices that changed since the checkpoint before, in the passages that all inspections keep. "
        "Likeness of weights is a cosine, of gates a correlation: near 1, two experts do the same. Below, every layer "
        "by itself."
    ) + "".join(map(left_out, series))
    parts: list[Part] = [widgets.lines("checkpoints", title, figure)] if figure is not None else []
    shown, panels = _layers(series)
    if shown:
        parts.append(widgets.panels("checkpoint-layers", title, shown, panels, slides=False))
    return Section(title, lead, [*parts, *(_table(i, one) for i, one in enumerate(series))])


def _layers(series: Sequence[Series]) -> tuple[list[str], list[tuple[str, str, int, Map | None]]]:
    """A layer × checkpoint map of each measure: what the menu calls it, and a panel for each model."""
    measured = [(measure, [one.values(measure).T for one in series]) for measure in LAYER_MEASURES]
    measured = [(measure, all_LC) for measure, all_LC in measured if any(np.isfinite(one).any() for one in all_LC)]
    panels = []
    for place, one in enumerate(series):
        views = []
        for measure, all_LC in measured:
            top = max(float(np.nanmax(values)) for values in all_LC if np.isfinite(values).any())
            views.append(view(measure.label, all_LC[place], places=4, top=max(top, 0.0) or 1.0))
        rows = [str(layer) for layer in range(len(one.checkpoints[0].inspection.layers))]
        panels.append((one.name, "", one.colour, _over_steps(one, views, rows, row="layer", scale="amount", unit="")))
    return [measure.label for measure, _ in measured], panels


def _loads(series: Sequence[Series], widgets: Widgets) -> Section:
    title = "Load of every expert through training"
    lead = (
        "Each row is an expert of one layer, each column a checkpoint: its load over all text, over the mean of the "
        "layer. A row that stays blue has died; stripes that change places are experts that take over from others."
    )
    panels, labels = [], []
    for one in series:
        counts_CLE = np.stack([found.inspection.arrays.counts_DLE.sum(0) for found in one.checkpoints])
        experts = [layer.num_experts for layer in one.checkpoints[0].inspection.layers]
        layers = thin(list(range(len(experts))), max(1, MOST_CELLS // len(series) // counts_CLE[:, 0].size))
        shares = [_share(counts_CLE[:, i, : experts[i]]) for i in layers]
        views = [view(f"layer {i}", share) for i, share in zip(layers, shares, strict=True)]
        rows = [str(expert) for expert in range(max(experts))]
        panels.append((one.name, "", one.colour, _over_steps(one, views, rows, row="expert", top=top_of(shares))))
        labels = max(labels, [shown["label"] for shown in views], key=len)
    return Section(title, lead, [widgets.panels("checkpoint-loads", title, labels, panels)])


def _share(counts_CE: np.ndarray) -> np.ndarray:
    """(E, C): load over the mean of the layer; NaN where nothing was counted."""
    mean_C1 = counts_CE.mean(-1, keepdims=True)
    return np.divide(counts_CE, mean_C1, out=np.full(counts_CE.shape, np.nan), where=mean_C1 > 0).T


def _over_steps(
    one: Series, views: list[dict[str, Any]], rows: list[str], *, top: float = 1.0, **more: Any
) -> Map | None:  # fmt: skip
    steps = [str(step) for step in one.steps]
    return heat_map(views, rows, top=top, cell="step", column="step", columns=steps, **more)


def _table(place: int, one: Series) -> Part:
    measures = [measure for measure in LAYER_MEASURES if np.isfinite(one.values(measure)).any()]
    columns = [dict(zip(curve.steps, curve.mean, strict=True)) if (curve := over_training(one, measure)[0]) else {}
               for measure in measures]  # fmt: skip
    rows = []
    for checkpoint, step in zip(one.checkpoints, one.steps, strict=True):
        cells = [Cell(f"{step:,}", step, [("", checkpoint.name)])]
        for measure, values in zip(measures, columns, strict=True):
            value = values.get(step)
            cells.append(Cell(number(value, measure.places), "" if value is None else value))
        rows.append(cells)
    inner = table(f"checkpoints-{place}", f"checkpoints of {one.name}", ["Step", *(m.label for m in measures)], rows)
    return "fold", {"summary": f"All checkpoints of {one.name}, means over the layers", "inner": inner, "open": False}
