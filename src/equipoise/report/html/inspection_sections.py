"""The sections of the page about inspections: specialization, balance, confidence and similarity of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ...storage.inspection_record import Inspection
from ..data.curves import thin
from ..data.formatting import clean, duration, number
from ..data.inspections import LAYER_COLUMNS, LayerColumn, NamedInspection, mean_of, straggler
from .figures import by_layer
from .heatmaps import Map, by_domain, heat_map, top_of, view
from .token_text import left_out, passages_of, vocabulary_of
from .widgets import Cell, Part, Section, Widgets, table

__all__ = ["inspection_cards", "inspection_origin", "inspection_sections"]

# Limits for all inspections together; beyond them layers are left out, evenly spaced.
MOST_DOMAIN_CELLS, MOST_PAIR_CELLS, MOST_SHARED_CELLS = 800_000, 800_000, 100_000
MOST_ALIKE = 200  # rows


def inspection_cards(found: Sequence[NamedInspection]) -> list[dict[str, Any]]:
    cards = []
    for one in found:
        facts, layers = one.inspection.facts, one.inspection.layers
        information, chance = (mean_of(one.inspection, LAYER_COLUMNS[3], floor=floor) for floor in (False, True))
        known = f"domain information; shuffled {number(chance)}"
        about = [
            known if math.isfinite(chance) else "one domain: nothing to tell apart",
            f"{facts.family}, {len(layers)} layers of {layers[0].num_experts if layers else 0}",
        ]
        if facts.biases:
            about.append(f"chosen with the expert biases of {facts.biases}")
        rows = (
            ("Busiest / mean", f"{number(straggler(one.inspection))} ×"),
            ("Dead experts", str(sum(len(layer.dead) for layer in layers))),
            ("Entropy", f"{number(mean_of(one.inspection, LAYER_COLUMNS[4]))} nats"),
        )
        cards.append({"name": one.name, "colour": one.colour, "big": number(information), "unit": "nats",
                      "facts": rows, "change": ("", ""), "about": about, "about_first": True})  # fmt: skip
    return cards


def inspection_sections(found: Sequence[NamedInspection], widgets: Widgets) -> list[Section]:
    """All sections in the order of the page, without those that have no data."""
    page = _Sections(found, widgets)
    made = (page.domains(), page.layers(), page.by_domain(), page.shared(), page.pairs(), page.alike(),
            page.vocabulary(), page.text())  # fmt: skip
    return [one for one in made if one]


class _Sections:
    def __init__(self, found: Sequence[NamedInspection], widgets: Widgets) -> None:
        self.found, self.widgets = found, widgets

    def domains(self) -> Section | None:
        def cells(one: Inspection) -> np.ndarray:
            uniform_L = np.array([layer.top_k / layer.num_experts for layer in one.layers])
            return one.frequency_DLE().transpose(1, 0, 2) / uniform_L[:, None, None]

        return self._maps(
            "inspected-domains", "Which expert reads which domain", cells, MOST_DOMAIN_CELLS,
            lambda label, one, layer, z: by_domain(label, z[:, : one.layers[layer].num_experts]),
            "Each column is an expert, each row a domain: how often a token of the domain chooses the expert, over "
            "what uniform routing would give. Rows that look alike mean experts that do not tell domains apart.",
            row="domain", column="experts, by the domain they favour",
        )  # fmt: skip

    def shared(self) -> Section | None:
        """Frequent experts that two domains share."""
        if max(len(one.inspection.domains) for one in self.found) < 2:
            return None
        rows = []
        for one in self.found:
            frequent_D, own_D = (
                flag.sum(-1).mean(-1) for flag in (one.inspection.high_DLE(), one.inspection.exclusive_DLE())
            )
            for domain, frequent, own in zip(one.inspection.domains, frequent_D, own_D, strict=True):
                rows.append([
                    Cell(one.name, colour=one.colour), Cell(domain.name), Cell(number(domain.tokens, 0), domain.tokens),
                    Cell(number(frequent, 1), frequent), Cell(number(own, 1), own),
                ])  # fmt: skip
        heads = ["Model", "Domain", "Tokens", "Frequent experts per layer", "Exclusive per layer"]
        return self._maps(
            "shared", "Experts that domains share", lambda one: one.shared_LDD(), MOST_SHARED_CELLS,
            lambda label, one, _, z: view(label, z, columns=[clean(d.name) for d in one.domains]),
            "How many experts two domains both choose at least twice as often as uniform routing would; on the "
            "diagonal, how many one domain has. Exclusive: frequent for one domain and no other.",
            table("exclusive", "frequent and exclusive experts by domain", heads, rows, left=(0, 1)),
            row="domain", cell="with", column="domains in the same order", scale="amount", unit=" experts",
        )  # fmt: skip

    def layers(self) -> Section:
        figure = by_layer([(m.label, self._curves(m)) for m in LAYER_COLUMNS])
        title = "Inspected layer by layer"
        lead = (
            "Dotted: what chance gives, in the colour of its model. MaxVio is the largest load of an expert over the "
            "mean load, minus 1, measured within a sequence, a micro-batch of one domain, or all text."
        )
        chart = [self.widgets.lines("inspected-layers", title, figure)] if figure is not None else []
        return Section(title, lead, chart + [self._layer_table(i, one) for i, one in enumerate(self.found)])

    def _curves(self, column: LayerColumn) -> list[tuple[str, int, list[float], list[float], str]]:
        curves = []
        for one in self.found:
            values = [_number(column.read(layer)) for layer in one.inspection.layers]
            floor = [_number(column.floor(layer)) for layer in one.inspection.layers] if column.floor else []
            curves.append((one.name, one.colour, values, floor, column.chance))
        return curves

    def _layer_table(self, index: int, one: NamedInspection) -> Part:
        rows = []
        columns = [m for m in LAYER_COLUMNS if any(m.read(layer) is not None for layer in one.inspection.layers)]
        for number_, layer in enumerate(one.inspection.layers):
            cells = [Cell(number_, number_, [("", layer.name)])]
            for column in columns:
                value, floor = column.read(layer), column.floor(layer) if column.floor else None
                small = [("", number(floor, column.places))] if floor is not None and value is not None else []
                cells.append(Cell(number(value, column.places), "" if value is None else value, small))
            cells += [Cell(len(which), len(which)) for which in (layer.dead, layer.idle)]
            rows.append(cells)
        heads = ["Layer", *(m.label for m in columns), "Dead", "Idle"]
        inner = table(f"layers-{index}", f"layers of {one.name}", heads, rows)
        summary = f"All layers of {one.name}; small: chance"
        return "fold", {"summary": summary, "inner": inner, "open": len(self.found) == 1 and len(rows) <= 12}

    def by_domain(self) -> Section | None:
        """Layer × domain maps of the numbers per domain and layer (top-K score: figure 4a of the paper)."""
        kinds: list[tuple[str, Callable[[Inspection], np.ndarray], str]] = [
            ("Top-K score", lambda one: one.arrays.topk_score_DL, ""),
            ("Router entropy, nats", lambda one: one.arrays.entropy_DL, " nats"),
            ("MaxVio, sequence", lambda one: one.arrays.maxvio_sequence_DL, ""),
            ("MaxVio, micro-batch", lambda one: one.arrays.maxvio_micro_batch_DL, ""),
            ("Saturation", lambda one: one.arrays.saturation_DL, ""),
        ]
        kinds = [kind for kind in kinds if any(np.isfinite(kind[1](one.inspection)).any() for one in self.found)]
        if not kinds:
            return None
        tops = [
            max(float(np.nanmax(c)) for one in self.found if np.isfinite(c := read(one.inspection)).any())
            for _, read, _ in kinds
        ]
        panels = []
        for one in self.found:
            views = [view(label, read(one.inspection), places=4, top=top or 1.0, unit=unit)
                     for (label, read, unit), top in zip(kinds, tops, strict=True)]  # fmt: skip
            rows = [domain.name for domain in one.inspection.domains]
            figure = heat_map(views, rows, top=1.0, row="domain", cell="layer", column="layer", scale="amount", unit="")
            panels.append((one.name, "", one.colour, figure))
        lead = (
            "Mean over the tokens of a domain (top-K score, entropy) or over its sequences and micro-batches (MaxVio)."
        )
        title, labels = "By domain and layer", [label for label, *_ in kinds]
        return Section(title, lead, [self.widgets.panels("by-domain", title, labels, panels, slides=False)])

    def pairs(self) -> Section | None:
        if all(layer.top_k == 1 for one in self.found for layer in one.inspection.layers):
            return None
        return self._maps(
            "pairs", "Experts chosen together", lambda one: one.lift_LEE(), MOST_PAIR_CELLS,
            lambda label, one, layer, z: view(label, z[: (e := one.layers[layer].num_experts), :e]),
            "How often a token chooses both experts, over what their loads alone would give: 1 is independent.",
            row="expert", column="expert", unit=" × expected",
        )  # fmt: skip

    def alike(self) -> Section:
        rows = []
        for one in self.found:
            for index, layer in enumerate(one.inspection.layers):
                where = [Cell(one.name, colour=one.colour), Cell(index, index)]
                idle = sorted(set(layer.idle) - set(layer.dead))
                for what, experts in (("never chosen", layer.dead), ("under a tenth of its share", idle)):
                    rows += [[*where, Cell(what), Cell(expert, expert), Cell("–", "")] for expert in experts]
                for what, pairs in (
                    ("alike in weights", layer.alike_weights),
                    ("alike in routing", layer.alike_routing),
                ):
                    rows += [[*where, Cell(what), Cell(f"{pair.first}, {pair.second}", pair.first),
                              Cell(number(pair.similarity, 3), pair.similarity)] for pair in pairs]  # fmt: skip
        title = "Dead and redundant experts"
        if not rows:
            return Section(title, "No expert is dead or idle, and no two are alike.")
        lead = (
            "Weights that do nothing, or are there twice: cosine of two experts' weights, correlation of their gates."
        )
        if len(rows) > MOST_ALIKE:
            lead += f" The first {MOST_ALIKE} of {len(rows)}."
        heads = ["Model", "Layer", "What", "Expert", "Similarity"]
        return Section(title, lead, [table("alike", title.lower(), heads, rows[:MOST_ALIKE], left=(0, 2))])

    def vocabulary(self) -> Section | None:
        self.widgets.texts["vocabulary"] = [vocabulary_of(one, len(self.found)) for one in self.found]
        if not any(one["layers"] for one in self.widgets.texts["vocabulary"]):
            return None
        lead = (
            "The token ids that give an expert most of its load: how many of its choices they are, and how many of the "
            "id's choices go to it; beside each a place where it chose the expert. Slide, or type an expert's number."
        )
        return Section("What one expert reads", lead, [("place", {"name": "vocabulary"})])

    def text(self) -> Section | None:
        self.widgets.texts["passages"] = [passages_of(one, len(self.found)) for one in self.found]
        if not any(one["passages"] for one in self.widgets.texts["passages"]):
            return None
        lead = (
            "Each token in the colour, and with the number, of its first expert in this layer. Point at a token, or go "
            "through the text with the arrow keys, to see all its experts; a click or Enter keeps one expert lit."
            + left_out(self.found, self.widgets.texts["passages"])
        )
        return Section("The text, coloured by expert", lead, [("place", {"name": "passages"})])

    def _maps(
        self, menu: str, title: str, cells: Callable[[Inspection], np.ndarray], most: int,
        show: Callable[..., dict], lead: str, *more: Part, **words: str,
    ) -> Section | None:  # fmt: skip
        """A map with one view per layer, of a deep model as many layers as fit."""
        figures: list[Map | None] = []
        labels: list[str] = []
        every = [cells(one.inspection) for one in self.found]
        top = top_of(every, 1.0 if words.get("scale") == "amount" else 2.0)
        for one, found_LXX in zip(self.found, every, strict=True):
            count = max(1, most // len(self.found) // max(1, found_LXX[0].size)) if len(found_LXX) else 0
            layers = thin(list(range(len(found_LXX))), count)
            views = [show(f"layer {layer}", one.inspection, layer, found_LXX[layer]) for layer in layers]
            rows = (
                [d.name for d in one.inspection.domains]
                if words["row"] == "domain"
                else list(map(str, range(found_LXX.shape[1])))
            )
            figures.append(heat_map(views, rows, top=top, **words))  # type: ignore[arg-type]
            if len(views) > len(labels):
                labels = [one_view["label"] for one_view in views]
        if not labels:
            return None
        deepest = max(len(one.inspection.layers) for one in self.found)
        if len(labels) < deepest:
            lead += f" {len(labels)} of {deepest} layers are shown."
        panels = [(one.name, "", one.colour, figure) for one, figure in zip(self.found, figures, strict=True)]
        return Section(title, lead, [self.widgets.panels(menu, title, labels, panels), *more])


def inspection_origin(found: Sequence[NamedInspection]) -> Part:
    rows = []
    for one in found:
        f = one.inspection.facts
        tokens = sum(domain.tokens for domain in one.inspection.domains)
        numbered = f" #{one.name.rpartition(' #')[2]}" if " #" in one.name else ""
        rows.append([
            Cell(f"{f.model}{numbered}", colour=one.colour), Cell(f.data), Cell(f.against or "–"),
            Cell(f"{tokens / 1e6:.2f} M", tokens), Cell(f.sequence_length, f.sequence_length),
            Cell(f"{f.device}, {f.dtype}"), Cell(duration(f.seconds), f.seconds), Cell(f.created),
        ])  # fmt: skip
    heads = ["Model", "Text", "Against", "Tokens", "Sequence", "Device", "Time", "Made"]
    return table("inspections", "inspections", heads, rows, left=(0, 1, 2, 5, 7))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
