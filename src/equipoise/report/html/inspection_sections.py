"""The sections of the page about inspections: specialization, balance, confidence and similarity of experts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from ...storage.inspection_record import Inspection
from ..data.curves import thin
from ..data.formatting import clean, duration, number
from ..data.inspections import LAYER_COLUMNS, LayerColumn, NamedInspection, mean_of, straggler
from .figures import by_layer
from .heatmaps import Map, by_domain, heat_map, top_of, view
from .token_text import left_out, passages_of, vocabulary_of
from .widgets import Widgets, breakable, cell, dot, safe, section, table

__all__ = ["inspection_cards", "inspection_origin", "inspection_sections"]

# Limits for all inspections together; beyond them layers are left out, evenly spaced.
MOST_DOMAIN_CELLS, MOST_PAIR_CELLS, MOST_SHARED_CELLS = 800_000, 800_000, 100_000
MOST_ALIKE = 200  # rows


def inspection_cards(found: Sequence[NamedInspection]) -> str:
    cards = []
    for one in found:
        facts, layers = one.inspection.facts, one.inspection.layers
        information, chance = (mean_of(one.inspection, LAYER_COLUMNS[3], floor=floor) for floor in (False, True))
        about = (
            f"domain information; shuffled {number(chance)}"
            if math.isfinite(chance)
            else "one domain: nothing to tell apart"
        )
        rows = (
            ("Busiest / mean", f"{number(straggler(one.inspection))} ×"),
            ("Dead experts", str(sum(len(layer.dead) for layer in layers))),
            ("Entropy", f"{number(mean_of(one.inspection, LAYER_COLUMNS[4]))} nats"),
        )
        sizes = f"{safe(facts.family)}, {len(layers)} layers of {layers[0].num_experts if layers else 0}"
        if facts.biases:
            sizes += f"<br>chosen with the expert biases of {breakable(facts.biases)}"
        listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in rows)
        cards.append(f"""<article class="card" {dot(one.colour)}>
<h3>{breakable(one.name)}</h3>
<p class="big">{number(information)} <small>nats</small></p>
<p class="delta">{about}<br>{sizes}</p>
<dl>{listed}</dl>
</article>""")
    return f'<div class="cards">{"".join(cards)}</div>\n'


def inspection_sections(found: Sequence[NamedInspection], widgets: Widgets) -> list[str]:
    """All sections in the order of the page, without those that have no data."""
    page = _Sections(found, widgets)
    return [page.domains(), page.layers(), page.by_domain(), page.shared(), page.pairs(), page.alike(),
            page.vocabulary(), page.text()]  # fmt: skip


class _Sections:
    def __init__(self, found: Sequence[NamedInspection], widgets: Widgets) -> None:
        self.found, self.widgets = found, widgets

    def domains(self) -> str:
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

    def shared(self) -> str:
        """Frequent experts that two domains share."""
        if max(len(one.inspection.domains) for one in self.found) < 2:
            return ""
        body = self._maps(
            "shared", "Experts that domains share", lambda one: one.shared_LDD(), MOST_SHARED_CELLS,
            lambda label, one, _, z: view(label, z, columns=[clean(d.name) for d in one.domains]),
            "How many experts two domains both choose at least twice as often as uniform routing would; on the "
            "diagonal, how many one domain has. Exclusive: frequent for one domain and no other.",
            row="domain", cell="with", column="domains in the same order", scale="amount", unit=" experts",
        )  # fmt: skip
        rows = []
        for one in self.found:
            frequent_D, own_D = (
                flag.sum(-1).mean(-1) for flag in (one.inspection.high_DLE(), one.inspection.exclusive_DLE())
            )
            for index, domain in enumerate(one.inspection.domains):
                rows.append(
                    cell(f"<i {dot(one.colour)}></i>{breakable(one.name)}", kind="th", left=True)
                    + cell(safe(domain.name), left=True) + cell(number(domain.tokens, 0), domain.tokens)
                    + cell(number(frequent_D[index], 1), frequent_D[index])
                    + cell(number(own_D[index], 1), own_D[index])
                )  # fmt: skip
        heads = ["Model", "Domain", "Tokens", "Frequent experts per layer", "Exclusive per layer"]
        listed = table("exclusive", "frequent and exclusive experts by domain", heads, rows, left=(0, 1))
        return body.replace("</section>", f"{listed}</section>")

    def layers(self) -> str:
        figure = by_layer([(m.label, self._curves(m)) for m in LAYER_COLUMNS])
        title = "Inspected layer by layer"
        lead = (
            "Dotted: what chance gives, in the colour of its model. MaxVio is the largest load of an expert over the "
            "mean load, minus 1, measured within a sequence, a micro-batch of one domain, or all text."
        )
        chart = ""
        if figure is not None:
            menu = self.widgets.select("inspected-layers", [one["label"] for one in figure["views"]], "Show")
            chart = f'<div class="tools">{menu}</div>{self.widgets.lines("inspected-layers", figure, title)}'
        return section(title, lead, chart + "".join(self._layer_table(i, one) for i, one in enumerate(self.found)))

    def _curves(self, column: LayerColumn) -> list[tuple[str, int, list[float], list[float], str]]:
        curves = []
        for one in self.found:
            values = [_number(column.read(layer)) for layer in one.inspection.layers]
            floor = [_number(column.floor(layer)) for layer in one.inspection.layers] if column.floor else []
            curves.append((one.name, one.colour, values, floor, column.chance))
        return curves

    def _layer_table(self, index: int, one: NamedInspection) -> str:
        rows = []
        columns = [m for m in LAYER_COLUMNS if any(m.read(layer) is not None for layer in one.inspection.layers)]
        for number_, layer in enumerate(one.inspection.layers):
            cells = [
                cell(f'{number_} <small title="{safe(layer.name)}">{safe(layer.name)}</small>', number_, "th", True)
            ]
            for column in columns:
                value, floor = column.read(layer), column.floor(layer) if column.floor else None
                small = (
                    f" <small>{number(floor, column.places)}</small>" if floor is not None and value is not None else ""
                )
                cells.append(
                    cell(
                        f'<span class="value">{number(value, column.places)}</span>{small}',
                        "" if value is None else value,
                    )
                )
            cells += [cell(str(len(layer.dead)), len(layer.dead)), cell(str(len(layer.idle)), len(layer.idle))]
            rows.append("".join(cells))
        heads = ["Layer", *(m.label for m in columns), "Dead", "Idle"]
        listed = table(f"layers-{index}", f"layers of {one.name}", heads, rows)
        shown = " open" if len(self.found) == 1 and len(rows) <= 12 else ""
        return (
            f"<details{shown}><summary>All layers of {breakable(one.name)}; small: chance</summary>{listed}</details>"
        )

    def by_domain(self) -> str:
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
            return ""
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
            panels.append((breakable(one.name), one.colour, figure))
        menu = self.widgets.select("by-domain", [label for label, *_ in kinds], "Show")
        made = self.widgets.panels("by-domain", "By domain and layer", panels)
        lead = (
            "Mean over the tokens of a domain (top-K score, entropy) or over its sequences and micro-batches (MaxVio)."
        )
        return section(
            "By domain and layer", lead, f'<div class="tools">{menu}{self.widgets.ramp("by-domain")}</div>{made}'
        )

    def pairs(self) -> str:
        return self._maps(
            "pairs", "Experts chosen together", lambda one: one.lift_LEE(), MOST_PAIR_CELLS,
            lambda label, one, layer, z: view(label, z[: (e := one.layers[layer].num_experts), :e]),
            "How often a token chooses both experts, over what their loads alone would give: 1 is independent.",
            row="expert", column="expert", unit=" × expected",
        ) if any(layer.top_k > 1 for one in self.found for layer in one.inspection.layers) else ""  # fmt: skip

    def alike(self) -> str:
        rows = []
        for one in self.found:
            who = cell(f"<i {dot(one.colour)}></i>{breakable(one.name)}", kind="th", left=True)
            for index, layer in enumerate(one.inspection.layers):
                where = who + cell(str(index), index)
                for what, experts in (
                    ("never chosen", layer.dead),
                    ("under a tenth of its share", sorted(set(layer.idle) - set(layer.dead))),
                ):
                    rows += [
                        where + cell(what, left=True) + cell(str(expert), expert) + cell("–", "") for expert in experts
                    ]
                for what, pairs in (
                    ("alike in weights", layer.alike_weights),
                    ("alike in routing", layer.alike_routing),
                ):
                    rows += [where + cell(what, left=True) + cell(f"{pair.first}, {pair.second}", pair.first)
                             + cell(number(pair.similarity, 3), pair.similarity) for pair in pairs]  # fmt: skip
        if not rows:
            return section("Dead and redundant experts", "No expert is dead or idle, and no two are alike.", "")
        lead = (
            "Weights that do nothing, or are there twice: cosine of two experts' weights, correlation of their gates."
        )
        if len(rows) > MOST_ALIKE:
            lead += f" The first {MOST_ALIKE} of {len(rows)}."
        heads = ["Model", "Layer", "What", "Expert", "Similarity"]
        return section("Dead and redundant experts", lead,
                       table("alike", "dead and redundant experts", heads, rows[:MOST_ALIKE], left=(0, 2)))  # fmt: skip

    def vocabulary(self) -> str:
        self.widgets.texts["vocabulary"] = [vocabulary_of(one, len(self.found)) for one in self.found]
        if not any(one["layers"] for one in self.widgets.texts["vocabulary"]):
            return ""
        lead = (
            "The token ids that give an expert most of its load: how many of its choices they are, and how many of the "
            "id's choices go to it; beside each a place where it chose the expert. Slide, or type an expert's number."
        )
        return section("What one expert reads", lead, '<div id="vocabulary"><p class="empty">Needs scripts.</p></div>')

    def text(self) -> str:
        self.widgets.texts["passages"] = [passages_of(one, len(self.found)) for one in self.found]
        if not any(one["passages"] for one in self.widgets.texts["passages"]):
            return ""
        lead = (
            "Each token in the colour, and with the number, of its first expert in this layer. Point at a token, or go "
            "through the text with the arrow keys, to see all its experts; a click or Enter keeps one expert lit."
            + left_out(self.found, self.widgets.texts["passages"])
        )
        return section(
            "The text, coloured by expert", lead, '<div id="passages"><p class="empty">Needs scripts.</p></div>'
        )

    def _maps(
        self, menu: str, title: str, cells: Callable[[Inspection], np.ndarray], most: int,
        show: Callable[..., dict], lead: str, **words: str,
    ) -> str:  # fmt: skip
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
            return ""
        deepest = max(len(one.inspection.layers) for one in self.found)
        if len(labels) < deepest:
            lead += f" {len(labels)} of {deepest} layers are shown."
        panels = [(breakable(one.name), one.colour, figure) for one, figure in zip(self.found, figures, strict=True)]
        tools = f'<div class="tools">{self.widgets.slider(menu, labels, "Show")}{self.widgets.ramp(menu)}</div>'
        return section(title, lead, tools + self.widgets.panels(menu, title, panels))


def inspection_origin(found: Sequence[NamedInspection]) -> str:
    rows = []
    for one in found:
        f = one.inspection.facts
        tokens = sum(domain.tokens for domain in one.inspection.domains)
        numbered = f" #{one.name.rpartition(' #')[2]}" if " #" in one.name else ""
        rows.append(
            cell(f"<i {dot(one.colour)}></i>{safe(f.model)}{safe(numbered)}", kind="th", left=True)
            + cell(safe(f.data), left=True)
            + cell(safe(f.against or "–"), left=True) + cell(f"{tokens / 1e6:.2f} M", tokens)
            + cell(str(f.sequence_length), f.sequence_length) + cell(safe(f"{f.device}, {f.dtype}"), left=True)
            + cell(duration(f.seconds), f.seconds) + cell(safe(f.created), left=True)
        )  # fmt: skip
    heads = ["Model", "Text", "Against", "Tokens", "Sequence", "Device", "Time", "Made"]
    return table("inspections", "inspections", heads, rows, left=(0, 1, 2, 5, 7))


def _number(value: float | None) -> float:
    return math.nan if value is None else value
