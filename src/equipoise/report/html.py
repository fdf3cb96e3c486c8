"""A comparison as one HTML file that holds everything it shows: charts, text, styles, and no link to anywhere."""

from __future__ import annotations

import json
import os
import re
import tempfile
from html import escape
from importlib import resources
from pathlib import Path

from ..errors import ConfigError, OutputError
from . import figures, tables
from .figures import Figure
from .summary import Comparison
from .tables import dot, safe
from .wording import clean, number

__all__ = ["render_html", "write_html"]

# A page of this report loads nothing; with this a browser would refuse even if a name smuggled a link in.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def write_html(comparison: Comparison, path: str | Path) -> Path:
    """Writes the page and returns its path. The file appears whole or not at all.

    Raises ConfigError without plotly, OutputError when the file cannot be written.
    """
    path = Path(path)
    text = render_html(comparison)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            file.write(text)
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise OutputError(expected=f"to write {path}", got=error.strerror or str(error),
                          do="free disk space or choose another file with --out") from None  # fmt: skip
    return path


def render_html(comparison: Comparison) -> str:
    """The page as text; the same comparison gives the same bytes."""
    page = _Page(comparison)
    sections = [page.quality_and_balance(), page.numbers(), page.domains_of_experts(), page.loads(), page.layers(),
                page.domains(), page.estimators(), page.origin()]  # fmt: skip
    names = [escape(clean(one.name), quote=False) for one in comparison.strategies]
    data = {"strategies": names, "figures": page.figures}
    title = " · ".join(clean(one.name) for one in comparison.strategies[:4])
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>equipoise: {escape(title)}</title>
<style>
{_asset("page.css")}</style>
</head>
<body>
<main>
{page.head()}
{"".join(sections)}
</main>
<footer><p>Made by equipoise {safe(comparison.versions.get("equipoise", ""))}. This file holds everything it shows and
loads nothing; without scripts the tables remain.</p></footer>
<script type="application/json" id="report-data">{_json(data)}</script>
<script>{_plotly()}</script>
<script>
{_asset("page.js")}</script>
</body>
</html>
"""


class _Page:
    """Builds the sections and collects the figures that they show."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.figures: dict[str, Figure] = {}

    def head(self) -> str:
        c, facts = self.comparison, self.comparison.facts
        seeds = {run.seed for one in c.strategies for run in one.runs}
        parts = [
            _count(len(c.strategies), "strategy", "strategies") + (f" × {len(seeds)} seeds" if len(seeds) > 1 else ""),
            f"{c.step} steps of {number(facts['tokens_per_step'], 0)} tokens" if c.step is not None else "",
            f"{facts['layers']} MoE layers of {facts['experts']} experts, top-{facts['top_k']}",
            f"{facts['active_parameters'] / 1e6:.1f} M of {facts['parameters'] / 1e6:.1f} M parameters active",
            f"{len(c.domains)} domains",
        ]
        notes = [f"<p>{safe(text)}</p>" for text in c.warnings]
        notes += [f"<p><strong>In the records:</strong> {safe(text)}</p>" for text in c.problems]
        aside = f'<aside class="notes" role="note">{"".join(notes)}</aside>' if notes else ""
        cards = "".join(tables.card(c, one, index) for index, one in enumerate(c.strategies))
        headline = re.sub(r"-(?=\d)", "−", escape(c.headline))
        return f"""<header>
<p class="mark"><b>equipoise</b> &nbsp;load balancing of mixture-of-experts training</p>
<h1>{headline}</h1>
<p class="facts">{" · ".join(filter(None, parts))}</p>
{aside}
</header>
<div class="cards">{cards}</div>
"""

    def quality_and_balance(self) -> str:
        quality = self._lines(
            "perplexity", "Held-out perplexity", figures.perplexity_curves(self.comparison),
            "How many tokens the model hesitates between on text it has not seen: lower is better. The first, steep "
            "part of the run lies above the frame.",
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
                text += ", paired by seed, with its 95% interval; coloured only where the interval leaves out zero"
            text += ". Bold: the best value."
        return _section("All numbers", text, tables.numbers_table(c))

    def domains_of_experts(self) -> str:
        labels, maps, top = figures.domain_maps(self.comparison)
        return self._maps(
            "domains", "What the experts specialize in", labels, maps, top,
            "Each column is an expert, each row a domain of the held-out text: how often the domain chooses the "
            "expert, over the even share. Rows that look alike mean experts that do not tell the domains apart.",
        )  # fmt: skip

    def loads(self) -> str:
        labels, maps, top = figures.load_maps(self.comparison)
        return self._maps(
            "loads", "Load of every expert", labels, maps, top,
            "How many tokens of one global batch each expert got, over the mean of its layer. In a balanced "
            "layer all cells have the colour of 1.",
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
        return _section("Domain by domain", lead, tables.per_domain_table(self.comparison))

    def estimators(self) -> str:
        figure = figures.estimator_curves(self.comparison)
        if figure is None:
            return ""
        lead = (
            "While a batch comes in pieces, the load of the whole is not known yet, and an estimate stands in for it. "
            "Relative error: length of the gradient's error over the exact gradient, 0 is exact; cosine: 1 is the "
            "right direction. Means over the steps at which it was measured."
        )
        plot = f'<div class="tools">{self._menu("estimators", figure)}</div>{self._plot("estimators", figure)}'
        return _section("How true the gradient is", lead, tables.estimators_table(self.comparison) + plot)

    def origin(self) -> str:
        c = self.comparison
        corpora = "<br>".join(f"<code>{safe(one)}</code>" for one in c.corpora)
        versions = ", ".join(f"{safe(name)} {safe(version)}" for name, version in c.versions.items())
        whose = f"{safe(c.baseline)}, seed {c[c.baseline].runs[0].seed}"
        body = f"""{tables.runs_table(c)}
<details><summary>What each strategy does</summary>{tables.policies_table(c)}</details>
<details><summary>Configuration of {whose}</summary>{tables.config_list(c.config)}</details>
<p class="lead origin">Corpus (SHA-256): {corpora}<br>Versions: {versions}</p>"""
        return _section("Where this comes from", "", body)

    def _lines(self, name: str, title: str, figure: Figure | None, lead: str) -> str:
        if figure is None:
            return _section(title, "", '<p class="empty">Nothing was recorded for this chart.</p>')
        body = f"""<div class="tools">{self._menu(name, figure)}</div>
<div class="tools">{self._chips()}</div>
{self._plot(name, figure, title, lines=True)}"""
        return _section(title, lead, body)

    def _maps(self, name: str, title: str, labels: list[str], maps: list[Figure | None], top: float, lead: str) -> str:
        if not any(maps):
            return ""
        panels = []
        for index, (one, figure) in enumerate(zip(self.comparison.strategies, maps, strict=True)):
            inner = '<p class="empty">Nothing recorded.</p>'
            if figure is not None:
                inner = self._plot(f"{name}-{index}", figure, f"{title}: {one.name}", menu=name)
            seed = f" <small>seed {one.runs[0].seed}</small>" if len(one.runs) > 1 else ""
            panels.append(f'<div class="panel"><h3><i {dot(index)}></i>{safe(one.name)}{seed}</h3>{inner}</div>')
        options = "".join(
            f"<option{' selected' if index == len(labels) - 1 else ''}>{safe(label)}</option>"
            for index, label in enumerate(labels)
        )
        menu = f'<select data-menu="{name}" aria-label="{title}: show">{options}</select>' if len(labels) > 1 else ""
        ramp = (
            f'<span class="scale">0 <span class="ramp" data-top="{top:g}">'
            f'<span class="even" style="left:{100 / top:.1f}%">1 = even</span></span> {top:g}×</span>'
        )
        tools = f'<div class="tools">{menu}{ramp}</div>'
        return _section(title, lead, f'{tools}<div class="panels">{"".join(panels)}</div>')

    def _chips(self) -> str:
        """A legend whose entries switch their strategy off and on, in all charts."""
        strategies = self.comparison.strategies if len(self.comparison.strategies) > 1 else []
        return "".join(
            f'<button class="chip" data-strategy="{index}" aria-pressed="true" {dot(index)}>'
            f"<i></i>{safe(one.name)}</button>"
            for index, one in enumerate(strategies)
        )

    def _menu(self, name: str, figure: Figure) -> str:
        if len(figure["views"]) < 2:
            return ""
        options = "".join(f"<option>{safe(view['label'])}</option>" for view in figure["views"])
        return f'<select data-menu="{name}" aria-label="show">{options}</select>'

    def _plot(self, name: str, figure: Figure, label: str = "", *, menu: str = "", lines: bool = False) -> str:
        identity = f"plot-{name}"
        self.figures[identity] = figure
        flag = ' data-lines="yes"' if lines else ""
        return (
            f'<div class="plot" id="{identity}" data-menu="{menu or name}"{flag} role="img" '
            f'aria-label="{safe(label)}" style="min-height:{min(figure["height"], 290)}px"></div>'
        )


def _section(title: str, lead: str, body: str) -> str:
    text = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return f"<section><h2>{title}</h2>{text}{body}</section>\n"


def _count(n: int, one: str, many: str) -> str:
    return f"{n} {one if n == 1 else many}"


def _json(data: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return (resources.files("equipoise.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(expected="plotly, which draws the charts of the page", got="it is not installed",
                          do="pip install 'equipoise[report]', or ask for --json") from None  # fmt: skip
    return get_plotlyjs()


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
