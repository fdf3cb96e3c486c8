"""The numbers of inspections: a name for each, a headline, and the columns of their layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from ...storage.inspection_record import Inspection, Layer
from .formatting import clean, number

__all__ = [
    "LAYER_COLUMNS",
    "STEP",
    "LayerColumn",
    "NamedInspection",
    "headline_of",
    "inspections_json",
    "mean_of",
    "name_inspections",
    "step_of",
    "straggler",
]

# in the name of a folder; step-3.5 is a model
STEP = r"(?:^|[-_.])(step|checkpoint|ckpt|iter|iteration)s?[-_]?0*(\d{1,12})(?!\d|\.\d)"


@dataclass(frozen=True)
class LayerColumn:
    """One number of an inspected layer: the terminal, the page and the CSV take theirs from ``LAYER_COLUMNS``.

    ``floor`` is what chance alone gives, if that is known.
    """

    label: str
    read: Callable[[Layer], float | None]
    floor: Callable[[Layer], float | None] | None = None
    chance: str = ""  # what the floor is called
    places: int | None = None


LAYER_COLUMNS = (
    LayerColumn("MaxVio, all text", lambda one: one.maxvio_global, lambda one: one.noise_global, "uniform routing", 2),
    LayerColumn("MaxVio, micro-batch", lambda one: one.maxvio_micro_batch, lambda one: one.noise_micro_batch,
                 "uniform routing", 2),
    LayerColumn("MaxVio, sequence", lambda one: one.maxvio_sequence, lambda one: one.noise_sequence,
                 "uniform routing", 2),
    LayerColumn("Domain information, nats", lambda one: one.information_corrected,
                 lambda one: one.information_shuffled, "domains shuffled"),
    LayerColumn("Router entropy per token, nats", lambda one: one.entropy_token,
                 lambda one: math.log(one.num_experts), "all experts alike", 2),
    LayerColumn("Entropy of the mean gate, nats", lambda one: one.entropy_mean,
                 lambda one: math.log(one.num_experts), "all experts alike", 2),
    LayerColumn("Top-K score", lambda one: one.topk_score, lambda one: one.top_k / one.num_experts,
                 "uniform gate", 3),
    LayerColumn("Choices told by the token id", lambda one: one.id_share, lambda one: one.id_share_chance,
                 "ids do not matter", 3),
    LayerColumn("Saturation", lambda one: one.saturation, lambda one: one.saturation_chance,
                 "independent choices", 3),
)  # fmt: skip


@dataclass(frozen=True)
class NamedInspection:
    """An inspection with a name that is unique on the page; ``colour`` is an index into the page's colours."""

    name: str
    colour: int
    inspection: Inspection

    @property
    def step(self) -> int | None:
        """Of training, that the weights are from; see `step_of`."""
        return step_of(self.inspection)


def name_inspections(inspections: Sequence[Inspection], first_colour: int = 0) -> list[NamedInspection]:
    """Names inspections by the last parts of the model's path, as many as make the names unique.

    Several checkpoints of one folder are told apart by their steps.
    """
    whole = [one.facts.model.rstrip("/") or "model" for one in inspections]
    for parts in (1, 2, 3):
        names = ["/".join(one.split("/")[-parts:]) for one in whole]
        if len(set(names)) == len(set(whole)):
            break
    seen: dict[str, int] = {}
    found = []
    for index, (name, inspection) in enumerate(zip(names, inspections, strict=True)):
        seen[name] = seen.get(name, 0) + 1
        own = f"{name} #{seen[name]}" if names.count(name) > 1 else name
        steps = [step_of(one) for one, other in zip(inspections, names, strict=True) if other == name]
        if len(steps) > 1 and None not in steps and len(set(steps)) == len(steps):
            own = f"{name} step {step_of(inspection)}"
        found.append(NamedInspection(own, first_colour + index, inspection))
    return found


def step_of(inspection: Inspection) -> int | None:
    """The training step of the weights: as recorded, else as the name of the model's folder has it; None without any.

    >>> from types import SimpleNamespace
    >>> [step_of(SimpleNamespace(facts=SimpleNamespace(step=None, model=name)))
    ...  for name in ("runs/a/checkpoint-500", "olmoe-step005000-tokens20B", "global_step30/", "Mixtral-8x7B")]
    [500, 5000, 30, None]
    """
    if inspection.facts.step is not None:
        return inspection.facts.step
    last = inspection.facts.model.rstrip("/").rpartition("/")[2]
    found = re.search(STEP, last, re.IGNORECASE)
    return int(found[2]) if found else None


def mean_of(inspection: Inspection, column: LayerColumn, *, floor: bool = False) -> float:
    """Mean over the layers that have the column; NaN if none has."""
    read = column.floor if floor else column.read
    values = [value for one in inspection.layers if read and (value := read(one)) is not None and math.isfinite(value)]
    return math.fsum(values) / len(values) if values else math.nan


def straggler(inspection: Inspection) -> float:
    """Largest load over mean load on all text, each domain weighted equally; mean over layers."""
    return 1 + mean_of(inspection, LAYER_COLUMNS[0])


def headline_of(found: Sequence[NamedInspection]) -> str:
    """The result of one inspection, or how far several differ, in a sentence."""
    about = LAYER_COLUMNS[3]
    knows = {one.name: mean_of(one.inspection, about) for one in found}
    known = {name: value for name, value in knows.items() if math.isfinite(value)}
    if len(found) > 1 and len(known) > 1:
        best, worst = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
        a, b = number(known[best]), number(known[worst])
        chance = max(mean_of(one.inspection, about, floor=True) for one in found if one.name in known)
        if known[best] < 2 * chance + 1e-4:
            return f"In none of these models the experts tell domains apart ({a} nats; chance {number(chance)})."
        if known[best] < 1.1 * known[worst] or a == b:
            return f"Experts tell domains apart as well in all of these models ({b} to {a} nats)."
        return f"Experts tell domains apart most in {clean(best)} ({a} nats), least in {clean(worst)} ({b})."
    one = found[0]
    text = f"In {clean(one.name)} "
    if one.name in known:
        chance = mean_of(one.inspection, about, floor=True)
        apart = known[one.name] > 2 * chance + 1e-4
        text += f"the experts {'tell domains apart' if apart else 'do not tell domains apart'} "
        text += f"({number(known[one.name])} nats, chance {number(chance)}); "
    dead = sum(len(layer.dead) for layer in one.inspection.layers)
    text += f"the busiest expert of a layer gets {number(straggler(one.inspection), 1)} times its share of all text"
    return text + (f", {dead} expert{'s are' if dead > 1 else ' is'} never chosen." if dead else ".")


def inspections_json(found: Sequence[NamedInspection]) -> list[dict[str, Any]]:
    """The numbers of each inspection without its arrays and texts."""
    return [
        {
            "name": one.name,
            "step": one.step,
            "facts": asdict(one.inspection.facts),
            "domains": [asdict(domain) for domain in one.inspection.domains],
            "layers": [asdict(layer) for layer in one.inspection.layers],
            "frequency": np.round(one.inspection.frequency_DLE(), 6).tolist(),
            "problems": one.inspection.problems,
        }
        for one in found
    ]
