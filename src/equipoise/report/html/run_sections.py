"""The sections of the page about runs: quality and balance over time, numbers, loads, domains, origin."""

from __future__ import annotations

from html import escape

from ..data.comparison import Comparison
from ..data.formatting import clean, number
from . import figures, tables
from . import heatmaps as maps
from .figures import Figure
from .widgets import Widgets, dot, safe, section

__all__ = ["run_cards", "run_facts", "run_origin", "run_sections"]


def run_facts(comparison: Comparison) -> list[str]:
    """Phrases about the setup, shown under the headline."""
    c, facts = comparison, comparison.facts
    seeds = {run.seed for one in c.strategies for run in one.runs}
    parts = [
        _count(len(c.strategies), "strategy", "strategies") + (f" × {len(seeds)} seeds" if len(seeds) > 1 else ""),
        f"{c.step} steps of {number(facts['tokens_per_step'], 0)} tokens" if c.step is not None else "",
        f"{facts['layers']} MoE layers of {facts['experts']} experts, top-{facts['top_k']}",
        f"{facts['active_parameters'] / 1e6:.1f} M of {facts['parameters'] / 1e6:.1f} M parameters active",
        f"{len(c.domains)} domains",
    ]
    return [part for part in parts if part]


def run_cards(comparison: Comparison) -> str:
    cards = "".join(tables.card(comparison, one, index) for index, one in enumerate(comparison.strategies))
    return f'<div class="cards">{cards}</div>\n'


def run_sections(comparison: Comparison, widgets: Widgets) -> list[str]:
    """All sections in the order of the page, without those that have no data."""
    page = _Sections(comparison, widgets)
    return [page.quality_and_balance(), page.numbers(), page.domains_of_experts(), page.loads(), page.layers(),
            page.domains(), page.estimators()]  # fmt: skip


class _Sections:
    def __init__(self, comparison: Comparison, widgets: Widgets) -> None:
        self.comparison, self.widgets = comparison, widgets

    def quality_and_balance(self) -> str:
        quality = self._lines(
            "perplexity", "Held-out perplexity", figures.perplexity_curves(self.comparison),
            "How many tokens the model hesitates between on text it has not seen: lower is better. The first, steep "
            "part of the run lies above the frame." + self._band(),
        )  # fmt: skip
        balance = self._lines(
            "training", "During training", figures.training_curves(self.comparison),
            "MaxVio is the largest load of an expert over the mean load, minus 1: 0 is even. Each point is a mean "
            "over neighbouring steps.",
        )  # fmt: skip
        return f'<div class="two">{quality}{balance}</div>'

    def numbers(self) -> str:
        c = self.comparison
        seeds = max(len(one.runs) for one in c.strategies)
        text = f"Means over {seeds} seeds. " if seeds > 1 else ""
        if len(c.strategies) > 1:
            text += f"Small: the difference from {clean(c.baseline)}"
            if any(d and d.n > 1 for one in c.strategies for d in one.differences.values()):
                text += ", paired by seed, with its 95% interval; coloured, and bold where it is better, only if the "
                text += "interval leaves out zero."
            else:
                text += ". One seed has no interval: nothing is coloured or bold."
        return section("All numbers", text, tables.numbers_table(c))

    def domains_of_experts(self) -> str:
        labels, found = maps.domain_maps(self.comparison)
        return self._maps(
            "domains", "What the experts specialize in", self.widgets.slider("domains", labels, "Show"), found,
            "Each column is an expert, each row a domain of the held-out text: how often the domain chooses the "
            "expert, over the even share. Rows that look alike mean experts that do not tell the domains apart.",
        )  # fmt: skip

    def loads(self) -> str:
        labels, found = maps.load_maps(self.comparison)
        return self._maps(
            "loads", "Load of every expert", self.widgets.slider("loads", labels, "Show"), found,
            "How many tokens of one global batch each expert got, over the mean of its layer. In a balanced "
            "layer all cells have the colour of 1. The slider moves through the run.",
        )  # fmt: skip

    def layers(self) -> str:
        return self._lines(
            "layers", "Layer by layer", figures.layer_curves(self.comparison),
            "The held-out measures of the table above, one point a layer.",
        )  # fmt: skip

    def domains(self) -> str:
        if not self.comparison.domains:
            return ""
        lead = "Held-out perplexity of each domain, and bits per byte (b/B), which do not depend on the tokenizer."
        return section("Domain by domain", lead, tables.per_domain_table(self.comparison))

    def estimators(self) -> str:
        figure = figures.estimator_curves(self.comparison)
        if figure is None:
            return ""
        lead = (
            "While a batch comes in pieces, the load of the whole is not known yet, and an estimate stands in for it. "
            "Relative error: length of the gradient's error over the exact gradient, 0 is exact; cosine: 1 is the "
            "right direction. Means over the steps at which it was measured."
        )
        title = "How true the gradient is"
        menu, chart = self._menu("estimators", figure), self.widgets.lines("estimators", figure, title)
        plot = f'<div class="tools">{menu}</div>{chart}'
        return section(title, lead, tables.estimators_table(self.comparison) + plot)

    def _lines(self, name: str, title: str, figure: Figure | None, lead: str) -> str:
        if figure is None:
            return section(title, "", '<p class="empty">Nothing was recorded for this chart.</p>')
        body = f"""<div class="tools">{self._menu(name, figure)}</div>
<div class="tools" role="group" aria-label="shown strategies">{self._chips()}</div>
{self.widgets.lines(name, figure, title, chips=True)}"""
        return section(title, lead, body)

    def _band(self) -> str:
        if not any(one.charts.difference for one in self.comparison.strategies):
            return ""
        return (
            " A band holds all seeds, easy and hard ones; of the difference, which goes seed by seed, it is the 95% "
            "interval."
        )

    def _menu(self, name: str, figure: Figure) -> str:
        return self.widgets.select(name, [view["label"] for view in figure["views"]], "Show")

    def _maps(self, menu: str, title: str, control: str, found: list[maps.Map | None], lead: str) -> str:
        if not any(found):
            return ""
        named = []
        for index, (one, figure) in enumerate(zip(self.comparison.strategies, found, strict=True)):
            seed = f" <small>seed {one.runs[0].seed}</small>" if len(one.runs) > 1 else ""
            named.append((f"{safe(one.name)}{seed}", index, figure))
        tools = f'<div class="tools">{control}{self.widgets.ramp(menu)}</div>'
        return section(title, lead, tools + self.widgets.panels(menu, title, named))

    def _chips(self) -> str:
        """A legend whose entries toggle their strategy in all charts."""
        strategies = self.comparison.strategies if len(self.comparison.strategies) > 1 else []
        return "".join(
            f'<button class="chip" type="button" data-strategy="{index}" aria-pressed="true" {dot(index)}>'
            f"<i></i>{safe(one.name)}</button>"
            for index, one in enumerate(strategies)
        )


def run_origin(comparison: Comparison) -> str:
    c = comparison
    corpora = "<br>".join(f"<code>{safe(one)}</code>" for one in c.corpora)
    versions = ", ".join(f"{safe(name)} {safe(version)}" for name, version in c.versions.items())
    whose = f"{safe(c.baseline)}, seed {c[c.baseline].runs[0].seed}"
    return f"""{tables.runs_table(c)}
<details><summary>What each strategy does</summary>{tables.policies_table(c)}</details>
<details><summary>Configuration of {whose}</summary>{tables.config_list(c.config)}</details>
<p class="lead origin">Corpus (SHA-256): {corpora}<br>Versions: {versions}</p>"""


def _count(n: int, one: str, many: str) -> str:
    return escape(f"{n} {one if n == 1 else many}")
