"""Renders a report as one self-contained HTML file: data, scripts and styles, without any link."""

from __future__ import annotations

import base64
import functools
import gzip
import json
import re
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from ...errors import ConfigError, OutputError
from ...storage.files import write_whole
from ...storage.inspection_record import Inspection
from ..data.comparison import Comparison
from ..data.formatting import clean
from ..data.inspections import NamedInspection, headline_of, name_inspections
from .inspection_sections import inspection_cards, inspection_origin, inspection_sections
from .run_sections import run_cards, run_facts, run_origin, run_sections
from .widgets import Widgets, minus, safe, section

__all__ = ["contents", "document", "render_html", "stylesheet", "write_file", "write_html"]

# The page loads nothing; this makes browsers refuse a link even if a name should inject one.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
STYLES = ("base", "figures", "tables", "text", "print")
SCRIPTS = ("state", "lines", "maps", "tables", "text", "controls")  # one module, in this order


def write_html(
    comparison: Comparison | None, path: str | Path, inspections: Sequence[Inspection] = (), *,
    problems: Sequence[str] = (), live: float = 0,
) -> Path:  # fmt: skip
    """Writes the page atomically and returns its path.

    Args:
        problems: sentences shown above the page, beside those of the comparison.
        live: seconds after which the page reloads itself and restores its state; 0 for never.

    Raises ConfigError if plotly is missing, OutputError if the file cannot be written.
    """
    return write_file(path, render_html(comparison, inspections, problems=problems, live=live))


def write_file(path: str | Path, text: str) -> Path:
    """``write_whole`` for a file that the user named; creates its folder."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())
    except OSError as error:
        raise OutputError(expected=f"to write {path}", got=error.strerror or str(error),
                          do="free disk space or choose another file with --out") from None  # fmt: skip
    return path


def render_html(
    comparison: Comparison | None, inspections: Sequence[Inspection] = (), *,
    problems: Sequence[str] = (), live: float = 0,
) -> str:  # fmt: skip
    """The page as text; see `write_html`. Equal arguments give equal bytes."""
    widgets = Widgets()
    found = name_inspections(inspections, len(comparison.strategies) if comparison else 0)
    runs = run_sections(comparison, widgets) if comparison else []
    inspected = inspection_sections(found, widgets) if found else []
    origin = (run_origin(comparison) if comparison else "") + (inspection_origin(found) if found else "")
    second = ""
    if comparison and found:  # the headline and cards at the top are those of the runs
        second = f'<p class="headline2">{minus(escape(headline_of(found)))}</p>\n{inspection_cards(found)}'
        second = f'<div role="group" aria-label="Inspections" class="second">{second}</div>'
    body = "".join([*runs, second, *inspected, section("Where this comes from", "", origin)])
    names = [one.name for one in comparison.strategies] if comparison else []
    data = {
        "strategies": [escape(clean(name), quote=False) for name in names],
        "figures": widgets.figures, "maps": widgets.maps, "menus": widgets.menus, "texts": widgets.texts,
    }  # fmt: skip
    title = " · ".join(map(clean, [*names, *(one.name for one in found)][:4]))
    version = next(iter([c.versions.get("equipoise", "") for c in [comparison] if c]
                        + [one.inspection.facts.versions.get("equipoise", "") for one in found]), "")  # fmt: skip
    content = f"{_head(comparison, found, problems, body, live)}\n{body}"
    foot = f"""Made by equipoise {safe(version)}. This file holds everything it shows and
loads nothing; without scripts the tables remain."""
    scripts = f"""<div id="spoken" class="unseen" role="status" aria-live="polite"></div>
<script type="application/gzip" id="report-data">{_packed(_json(data))}</script>
{f'<script type="application/gzip" id="report-plotly">{_plotly()}</script>' if widgets.figures else ""}
<script type="module">
{"".join(_asset(f"{name}.js") for name in SCRIPTS)}</script>
"""
    return document(title, content, foot, stylesheet(*STYLES), scripts)


def document(title: str, content: str, foot: str, styles: str, scripts: str = "") -> str:
    """The frame of every page: title as text, all else as HTML and CSS. It forbids itself to load anything."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>equipoise: {escape(title)}</title>
<style>
{styles}</style>
</head>
<body>
<a class="skip" href="#content">To the content</a>
<main id="content" tabindex="-1">
{content}</main>
<footer><p>{foot}</p></footer>
{scripts}</body>
</html>
"""


def stylesheet(*names: str) -> str:
    """The rules of these parts of the look: base, figures, tables, text, print."""
    return "".join(_asset(f"{name}.css") for name in names)


def contents(body: str) -> str:
    """Links to the headings (h2) of a page's sections."""
    links = re.findall(r'<h2 id="([a-z0-9-]+)"[^>]*>(.*?)</h2>', body)
    items = "".join(f'<li><a href="#{name}">{title}</a></li>' for name, title in links)
    return f'<nav aria-label="Sections"><ul>{items}</ul></nav>'


def _head(
    comparison: Comparison | None, found: Sequence[NamedInspection], problems: Sequence[str], body: str, live: float
) -> str:
    notes = [f"<p>{safe(text)}</p>" for text in (comparison.warnings if comparison else [])]
    unread = [*(comparison.problems if comparison else []), *problems]
    unread += [f"{one.name}: {text}" for one in found for text in one.inspection.problems]
    notes += [f"<p><strong>In the records:</strong> {safe(text)}</p>" for text in unread]
    aside = f'<aside class="notes" aria-label="Remarks">{"".join(notes)}</aside>' if notes else ""
    headline = comparison.headline if comparison else headline_of(found) if found else "Nothing to show yet."
    facts = run_facts(comparison) if comparison else []
    cards = run_cards(comparison) if comparison else inspection_cards(found) if found else ""
    quality = comparison.quality if comparison else ""
    refresh = (
        f'<p class="live" id="live" data-seconds="{live:g}"><i aria-hidden="true"></i> The run goes on: this page '
        f'refreshes every {live:g} s. <button class="quiet" type="button">Pause</button></p>'
    )
    return f"""<header>
<p class="mark"><b>equipoise</b> &nbsp;load balancing of mixture-of-experts training</p>
<h1>{minus(escape(headline))}</h1>
{f'<p class="quality">{minus(escape(quality))}</p>' if quality else ""}
<p class="facts">{" · ".join(facts)}</p>
{refresh if live else ""}
{aside}
<p class="notes" id="too-old" hidden>This browser is too old to unpack the figures of this page: only its text and
tables are shown. Any browser from 2023 on draws them.</p>
{contents(body)}
</header>
{cards}"""


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _packed(text: str) -> str:
    """Compressed, in characters that cannot close the surrounding script element."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", errors="replace"), 6, mtime=0)).decode()


def _asset(name: str) -> str:
    return (resources.files("equipoise.report.html") / "assets" / name).read_text(encoding="utf-8")


@functools.cache
def _plotly() -> str:
    """plotly.js, compressed from 4.8 to 2.0 MB."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(expected="plotly, which draws the charts of the page", got="it is not installed",
                          do="pip install 'equipoise[report]', or ask for --json") from None  # fmt: skip
    return _packed(get_plotlyjs())
