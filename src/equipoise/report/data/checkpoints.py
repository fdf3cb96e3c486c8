"""Inspections of several checkpoints of one model, in the order of training: how its numbers go through time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from ...storage.inspection_record import Inspection
from .curves import Curve
from .formatting import clean, number
from .inspections import LAYER_COLUMNS, STEP, LayerColumn, NamedInspection, headline_of, mean_of

__all__ = ["LAYER_MEASURES", "LayerMeasure", "Series", "churn_between", "headline_with_time", "in_full", "left_out",
           "over_training", "series_of"]  # fmt: skip

SIDE_BY_SIDE = 3  # checkpoints of one model; of more, only the first and the last are shown in full


@dataclass(frozen=True)
class Series:
    """Checkpoints of one model, by ascending step; ``colour`` is an index into the page's colours."""

    name: str
    colour: int
    checkpoints: list[NamedInspection]
    known: dict[str, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # what was read before

    @property
    def steps(self) -> list[int]:
        return [one.step or 0 for one in self.checkpoints]

    def values(self, measure: LayerMeasure) -> np.ndarray:
        """(checkpoints, layers), NaN where it is not known."""
        if measure.label not in self.known:
            self.known[measure.label] = measure.read(self)
        return self.known[measure.label]


@dataclass(frozen=True)
class LayerMeasure:
    """A number of each layer of each checkpoint; ``read`` does the work of ``Series.values``."""

    label: str
    read: Callable[[Series], np.ndarray]
    floor: LayerColumn | None = None  # whose chance it is told against
    summed: bool = False  # over the layers, in place of their mean
    places: int | None = None


def series_of(found: Sequence[NamedInspection]) -> list[Series]:
    """Groups of two or more inspections that look at one model, with the same text, at different steps."""
    groups: dict[tuple[object, ...], list[NamedInspection]] = {}
    for one in found:
        if one.step is not None:
            groups.setdefault(_key(one.inspection), []).append(one)
    made = []
    for group in groups.values():
        steps = [one.step for one in group]
        if len(group) > 1 and len(set(steps)) == len(steps):
            checkpoints = sorted(group, key=lambda one: one.step or 0)
            made.append(Series(_name(group), checkpoints[0].colour, checkpoints))
    return made


def over_training(series: Series, measure: LayerMeasure) -> tuple[Curve | None, Curve | None]:
    """Over the steps the mean over the layers, between the lowest layer and the highest; and the mean of chance.

    A sum over the layers has no band. None where no checkpoint knows it.
    """
    values_CL = series.values(measure)
    known = [i for i, row in enumerate(values_CL) if np.isfinite(row).any()]
    if not known:
        return None, None
    steps = [series.steps[i] for i in known]
    rows = [values_CL[i][np.isfinite(values_CL[i])] for i in known]
    if measure.summed:
        return Curve(steps, [float(row.sum()) for row in rows]), None
    several = max(len(row) for row in rows) > 1
    low, high = ([float(end(row)) for row in rows] if several else None for end in (np.min, np.max))
    curve = Curve(steps, [float(row.mean()) for row in rows], low, high)
    if measure.floor is None:
        return curve, None
    chance = [mean_of(series.checkpoints[i].inspection, measure.floor, floor=True) for i in known]
    return curve, Curve(steps, chance) if all(map(math.isfinite, chance)) else None


def churn_between(before: Inspection, after: Inspection) -> np.ndarray:
    """(L,): routing churn, the share of the choices in the recorded passages that are others now; NaN of other text.

    The order of the chosen experts does not matter. docs/measures.md has the definition.
    """
    one, other = before.arrays, after.arrays
    alike = one.passage_ids_NS.shape == other.passage_ids_NS.shape and np.array_equal(
        one.passage_ids_NS, other.passage_ids_NS
    )
    if not alike or one.passage_experts_NSLK.shape != other.passage_experts_NSLK.shape or not one.passage_ids_NS.size:
        return np.full(len(after.layers), math.nan)
    old, new = one.passage_experts_NSLK, other.passage_experts_NSLK
    chosen = new >= 0
    kept = (new[..., :, None] == old[..., None, :]).any(-1) & chosen
    counted_L = chosen.sum((0, 1, 3))
    share_L = kept.sum((0, 1, 3)) / np.maximum(counted_L, 1)
    return np.where(counted_L > 0, 1 - share_L, math.nan)


def in_full(found: Sequence[NamedInspection]) -> list[NamedInspection]:
    """Those whose maps and texts are shown: of many checkpoints of one model the first and the last."""
    dropped = {one.name for series in series_of(found) for one in _between(series)}
    return [one for one in found if one.name not in dropped]


def left_out(series: Series) -> str:
    """A sentence, after a space, about what `in_full` leaves out of a series; empty if that is nothing."""
    if not _between(series):
        return ""
    ends = f"the first and the last of the {len(series.steps)} checkpoints of {clean(series.name)}"
    return f" The sections after that show {ends}; to see others in full, name fewer of them."


def _between(series: Series) -> list[NamedInspection]:
    return series.checkpoints[1:-1] if len(series.checkpoints) > SIDE_BY_SIDE else []


def headline_with_time(found: Sequence[NamedInspection]) -> str:
    """`headline_of`; of the checkpoints of one model, what happened between the first and the last."""
    series = series_of(found)
    if len(series) == 1 and len(series[0].checkpoints) == len(found):
        return _told(series[0])
    return headline_of(in_full(found))


def _told(series: Series) -> str:
    parts = []
    for label, measure, places in (("MaxVio over all text", 0, 2), ("domain information", 3, None)):
        curve, _ = over_training(series, LAYER_MEASURES[measure])
        if curve is not None and len(curve.mean) > 1:
            unit = " nats" if measure == 3 else ""
            parts.append(f"{label} {number(curve.mean[0], places)} to {number(curve.mean[-1], places)}{unit}")
    first, last = (sum(len(layer.dead) for layer in one.inspection.layers)
                   for one in (series.checkpoints[0], series.checkpoints[-1]))  # fmt: skip
    parts.append(f"dead experts {first} to {last}" if first != last else f"dead experts {last} as before")
    return f"{clean(series.name)} from step {series.steps[0]:,} to {series.steps[-1]:,}: {', '.join(parts)}."


def _key(inspection: Inspection) -> tuple[object, ...]:
    """What two checkpoints of one model have in common: the path without its step, the layers, and the text."""
    facts = inspection.facts
    layers = tuple((layer.name, layer.num_experts, layer.top_k) for layer in inspection.layers)
    domains = tuple(domain.name for domain in inspection.domains)
    return _without_step(facts.model), facts.family, facts.data, facts.sequence_length, layers, domains


def _without_step(model: str) -> str:
    folder, slash, last = model.rstrip("/").rpartition("/")
    return f"{folder}{slash}{re.sub(STEP, '', last, flags=re.IGNORECASE)}"


def _name(group: Sequence[NamedInspection]) -> str:
    path = _without_step(group[0].inspection.facts.model).rstrip("/")
    return path.rpartition("/")[2] or "model"


def _column(column: LayerColumn) -> Callable[[Series], np.ndarray]:
    def read(series: Series) -> np.ndarray:
        return np.array([
            [math.nan if (value := column.read(layer)) is None else value for layer in one.inspection.layers]
            for one in series.checkpoints
        ], dtype=np.float64)  # fmt: skip

    return read


def _count(name: str) -> Callable[[Series], np.ndarray]:
    return lambda series: np.array(
        [[float(len(getattr(layer, name))) for layer in one.inspection.layers] for one in series.checkpoints]
    )


def _changed(series: Series) -> np.ndarray:
    inspections = [one.inspection for one in series.checkpoints]
    first = np.full(len(inspections[0].layers), math.nan)
    return np.stack([first, *(churn_between(*pair) for pair in pairwise(inspections))])


def _alike(array: str, take: Callable[[np.ndarray], float]) -> Callable[[Series], np.ndarray]:
    """Of all pairs of different experts of a layer, what ``take`` says of their likeness."""

    def read(series: Series) -> np.ndarray:
        found = []
        for one in series.checkpoints:
            likeness_LEE = getattr(one.inspection.arrays, array).astype(np.float64)
            pairs = [
                likeness_LEE[i, :e, :e][~np.eye(e, dtype=bool)]
                for i, e in enumerate(layer.num_experts for layer in one.inspection.layers)
            ]
            known = [pair[np.isfinite(pair)] for pair in pairs]
            found.append([float(take(pair)) if pair.size else math.nan for pair in known])
        return np.array(found)

    return read


LAYER_MEASURES = (
    *(LayerMeasure(column.label, _column(column), column if column.floor else None, places=column.places)
      for column in LAYER_COLUMNS[:4]),
    LayerMeasure("Dead experts, all layers", _count("dead"), summed=True, places=0),
    LayerMeasure("Idle experts, all layers", _count("idle"), summed=True, places=0),
    LayerMeasure("Routing churn since the checkpoint before", _changed, places=3),
    LayerMeasure("Likeness of two experts' weights, mean of all pairs", _alike("weight_similarity_LEE", np.mean)),
    LayerMeasure("Likeness of two experts' weights, the most alike", _alike("weight_similarity_LEE", np.max)),
    LayerMeasure("Likeness of two experts' gates, the most alike", _alike("routing_similarity_LEE", np.max)),
    *(LayerMeasure(column.label, _column(column), column if column.floor else None, places=column.places)
      for column in LAYER_COLUMNS[4:]),
)  # fmt: skip
