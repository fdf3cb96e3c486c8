"""The sections of the page about runs: quality and balance over time, numbers, loads, domains, origin."""

from __future__ import annotations

from ..data.comparison import Comparison
from ..data.formatting import clean, number, plural
from . import figures, tables
from . import heatmaps as maps
from .figures import Figure
from .widgets import Part, Section, Widgets

__all__ = ["counts_of", "run_facts", "run_origin", "run_sections"]


def run_facts(comparison: Comparison) -> list[str]:
    """Phrases about the setup, shown under the headline."""
    c, facts = comparison, comparison.facts
    seeds = {run.seed for one in c.strategies for run in one.runs}
    many = len(c.strategies)
    parts = [
        f"{many} {'strategy' if many == 1 else 'strategies'}" + (f" × {len(seeds)} seeds" if len(seeds) > 1 else ""),
        f"{c.step} steps of {number(facts['tokens_per_step'], 0)} tokens" if c.step is not None else "",
        f"{plural(facts['layers'], 'MoE layer')} of {facts['experts']} experts, top-{facts['top_k']}",
        f"{facts['active_parameters'] / 1e6:.1f} M of {facts['parameters'] / 1e6:.1f} M parameters active",
        f"{len(c.domains)} domains",
    ]
    return [part for part in parts if part]


def counts_of(comparison: Comparison) -> list[str]:
    """What a legend says of each strategy: the number of seeds in its curves, where any has several."""
    numbers = [len(one.charts.seeds) for one in comparison.strategies]
    return [f"n = {number}" if max(numbers) > 1 else "" for number in numbers]


def run_sections(comparison: Comparison, widgets: Widgets) -> list[Section]:
    """All sections in the order of the page, without those that have no data; the first two are always there."""
    page = _Sections(comparison, widgets)
    made = (page.quality(), page.balance(), page.numbers(), page.domains_of_experts(), page.loads(), page.groups(),
            page.widths(), page.layers(), page.domains(), page.estimators())  # fmt: skip
    return [one for one in made if one]


class _Sections:
    def __init__(self, comparison: Comparison, widgets: Widgets) -> None:
        self.comparison, self.widgets = comparison, widgets
        names = [one.name for one in comparison.strategies]
        self.chips = list(zip(names, counts_of(comparison), strict=True)) if len(names) > 1 else []

    def quality(self) -> Section:
        return self._lines(
            "perplexity", "Held-out perplexity", figures.perplexity_curves(self.comparison),
            "How many tokens the model hesitates between on text it has not seen: lower is better. The first, steep "
            "part of the run lies above the frame." + self._bands(),
        )  # fmt: skip

    def balance(self) -> Section:
        return self._lines(
            "training", "During training", figures.training_curves(self.comparison),
            "MaxVio is the largest load of an expert over the mean load, minus 1: 0 is even. Each point is a mean "
            "over neighbouring steps.",
        )  # fmt: skip

    def numbers(self) -> Section:
        c = self.comparison
        seeds = max(len(one.charts.seeds) for one in c.strategies)
        text = f"Means over {seeds} seeds. " if seeds > 1 else ""
        if len(c.strategies) > 1:
            text += f"Small: the difference from {clean(c.baseline)}"
            if any(d and d.n > 1 for one in c.strategies for d in one.differences.values()):
                text += ", paired by seed, with its 95% interval; coloured, and bold where it is better, only if the "
                text += "interval leaves out zero."
            else:
                text += ". One seed has no interval: nothing is coloured or bold."
        return Section("All numbers", text, [tables.numbers_table(c)])

    def domains_of_experts(self) -> Section | None:
        return self._maps(
            "domains", "What the experts specialize in", *maps.domain_maps(self.comparison),
            "Each column is an expert, each row a domain of the held-out text: how often the domain chooses the "
            "expert, over the even share. Rows that look alike mean experts that do not tell the domains apart.",
        )  # fmt: skip

    def loads(self) -> Section | None:
        lead = (
            "How many tokens of one global batch each expert got, over the mean of its layer. In a balanced "
            "layer all cells have the colour of 1. The slider moves through the run."
        )
        if any(one.charts.groups for one in self.comparison.strategies):
            lead += " Lines part groups of experts: a strategy's own, else those of another."
        return self._maps("loads", "Load of every expert", *maps.load_maps(self.comparison), lead)

    def groups(self) -> Section | None:
        title, figure = "Load of groups of experts", figures.group_curves(self.comparison)
        if figure is None:
            return None
        lead = (
            "What a policy over groups balances, or what a router that chooses groups first may use: the largest load "
            "of a group over the share that it is to have, minus 1, in the global batches that were recorded, mean "
            "over the layers. All strategies are measured over the same groups. Below it, every group in the last of "
            "these batches."
        )
        found = self._lines("groups", title, figure, lead)
        shown = self._maps("group-loads", title, *maps.group_maps(self.comparison), lead, slides=False)
        return Section(title, lead, [*found.parts, *(shown.parts if shown else [])])

    def widths(self) -> Section | None:
        if not any(one.load_by_width for one in self.comparison.strategies):
            return None
        lead = (
            "Load of an expert of each width over the even load, on held-out text, mean over layers and seeds: above 1 "
            "it is used more than its share. What a token costs by that is its active width, among the numbers above."
        )
        return Section("Which widths are used", lead, [tables.widths_table(self.comparison)])

    def layers(self) -> Section:
        return self._lines(
            "layers", "Layer by layer", figures.layer_curves(self.comparison),
            "The held-out measures of the table above, one point a layer.",
        )  # fmt: skip

    def domains(self) -> Section | None:
        if not self.comparison.domains:
            return None
        title = "Domain by domain"
        lead = "Held-out perplexity of each domain, and bits per byte (b/B), which do not depend on the tokenizer."
        parts = [tables.per_domain_table(self.comparison)]
        if (inner := tables.frequency_table(self.comparison)) is not None:
            summary = "Rare and frequent tokens: loss by tenths of the training text, nats"
            parts.append(("fold", {"summary": summary, "inner": inner}))
        figure = figures.domain_load_curves(self.comparison)
        if figure is not None:
            lead += (
                " Below it the load of one domain's tokens alone, as MaxVio, mean over the layers: what is even over "
                "all text may be uneven in each domain, where experts specialize."
            )
            parts += self._lines("domain-loads", "Load of one domain", figure, lead).parts
        return Section(title, lead, parts)

    def estimators(self) -> Section | None:
        figure = figures.estimator_curves(self.comparison)
        if figure is None:
            return None
        lead = (
            "While a batch comes in pieces, the load of the whole is not known yet, and an estimate stands in for it. "
            "Relative error: length of the gradient's error over the exact gradient, 0 is exact; cosine: 1 is the "
            "right direction. Means over the steps at which it was measured."
        )
        title = "How true the gradient is"
        lines = self.widgets.lines("estimators", title, figure)
        return Section(title, lead, [tables.estimators_table(self.comparison), lines])

    def _lines(self, name: str, title: str, figure: Figure | None, lead: str) -> Section:
        if figure is None:
            return Section(title, "", [("empty", {"text": "Nothing was recorded for this chart."})])
        # the chips are a legend whose entries toggle their strategy in all charts
        return Section(title, lead, [self.widgets.lines(name, title, figure, self.chips)])

    def _bands(self) -> str:
        if not any(len(one.charts.seeds) > 1 for one in self.comparison.strategies):
            return ""
        return " n is the number of seeds behind a line and its band; the text below a chart says what the two are."

    def _maps(
        self, menu: str, title: str, labels: list[str], found: list[maps.Map | None], lead: str, *, slides: bool = True
    ) -> Section | None:
        if not any(found):
            return None
        named = []
        for index, (one, figure) in enumerate(zip(self.comparison.strategies, found, strict=True)):
            note = f"seed {one.charts.seeds[0]}" if len(one.runs) > 1 else ""
            named.append((one.name, note, index, figure))
        return Section(title, lead, [self.widgets.panels(menu, title, labels, named, slides=slides)])


def run_origin(comparison: Comparison) -> list[Part]:
    c = comparison
    whose = f"{c.baseline}, seed {c[c.baseline].runs[0].seed}"
    settings = [
        (key, (", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)) or "–")
        for key, value in c.config.items()
    ]
    versions = ", ".join(f"{name} {version}" for name, version in c.versions.items())
    return [
        tables.runs_table(c),
        ("fold", {"summary": "What each strategy does", "inner": tables.policies_table(c)}),
        ("fold", {"summary": f"Configuration of {whose}", "inner": ("settings", {"settings": settings})}),
        ("origin", {"corpora": c.corpora, "versions": versions}),
    ]
