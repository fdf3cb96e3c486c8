"""Renders a report as one self-contained HTML file: data, scripts and styles, without any link."""

from __future__ import annotations

import base64
import functools
import gzip
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from ...errors import ConfigError, OutputError
from ...storage.files import write_whole
from ...storage.inspection_record import Inspection
from ..data.checkpoints import headline_with_time, in_full
from ..data.comparison import Comparison
from ..data.formatting import clean
from ..data.inspections import name_inspections
from .checkpoint_sections import checkpoint_sections
from .inspection_sections import inspection_cards, inspection_origin, inspection_sections
from .rendering import render
from .run_sections import counts_of, run_facts, run_origin, run_sections
from .tables import card
from .widgets import Section, Widgets

__all__ = ["figures_page", "render_html", "write_file", "write_html"]

# One module, in this order; "text" draws what the sections of inspections ask for.
SCRIPTS = ("state", "lines", "maps", "svg", "tables", "text", "controls")
STYLES = ("base", "figures", "tables", "text", "print")


def write_html(
    comparison: Comparison | None, path: str | Path, inspections: Sequence[Inspection] = (), *,
    problems: Sequence[str] = (), live: float = 0,
) -> Path:  # fmt: skip
    """Writes the page atomically and returns its path.

    Args:
        problems: sentences shown above the page, beside those of the comparison.
        live: seconds after which the page reloads itself and restores its state; 0 for never.

    Raises ConfigError if plotly or jinja2 is missing, OutputError if the file cannot be written.
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
    c, widgets = comparison, Widgets()
    found = name_inspections(inspections, len(c.strategies) if c else 0)
    runs = run_sections(c, widgets) if c else []
    full = in_full(found)
    inspected = [*checkpoint_sections(found, widgets), *inspection_sections(full, widgets)] if found else []
    origin = [*(run_origin(c) if c else []), *([inspection_origin(found)] if found else [])]
    names = [one.name for one in c.strategies] if c else []
    headline = c.headline if c else headline_with_time(found) if found else "Nothing to show yet."
    unread = [*(c.problems if c else []), *problems]
    unread += [f"{one.name}: {text}" for one in found for text in one.inspection.problems]
    version = next(iter([one.versions.get("equipoise", "") for one in [c] if one]
                        + [one.inspection.facts.versions.get("equipoise", "") for one in found]), "")  # fmt: skip
    return figures_page(
        "report.html.jinja", widgets, names, counts_of(c) if c else [],
        title=" · ".join([*names, *(one.name for one in full)][:4]), version=version,
        mark="load balancing of mixture-of-experts training",
        headline=headline, quality=c.quality if c else "", facts=run_facts(c) if c else [],
        warnings=c.warnings if c else [], problems=unread, live=f"{live:g}" if live else "",
        second=headline_with_time(found) if c and found else "",  # at the top are headline and cards of the runs
        run_cards=[card(c, one, index) for index, one in enumerate(c.strategies)] if c else [],
        inspection_cards=inspection_cards(full),
        runs=runs, sections=[*runs, *inspected, Section("Where this comes from", "", origin)],
    )  # fmt: skip


def figures_page(template: str, widgets: Widgets, names: Sequence[str], counts: Sequence[str], **data: Any) -> str:
    """A template of a page with figures, as text.

    Args:
        widgets: what the sections of the page have asked for.
        names: of the strategies that curves are of. counts: what is said of each in a legend ("n = 3"), or nothing.
    """
    packed = {
        "strategies": [escape(clean(name), quote=False) for name in names],  # Plotly reads a little HTML
        "counts": list(counts), "figures": widgets.figures, "maps": widgets.maps, "menus": widgets.menus,
        "texts": widgets.texts,
    }  # fmt: skip
    return render(
        template, **data, styles=STYLES, scripts=SCRIPTS, data=_packed(_json(packed)),
        plotly=_plotly() if widgets.figures else "",
    )  # fmt: skip


def _json(data: object) -> str:
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _packed(text: str) -> str:
    """Compressed, in characters that cannot close the surrounding script element."""
    return base64.b64encode(gzip.compress(text.encode("utf-8", errors="replace"), 6, mtime=0)).decode()


@functools.cache
def _plotly() -> str:
    """plotly.js, compressed from 4.8 to 2.0 MB."""
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise ConfigError(expected="plotly, which draws the charts of the page", got="it is not installed",
                          do="pip install 'equipoise[report]', or ask for --json") from None  # fmt: skip
    return _packed(get_plotlyjs())
