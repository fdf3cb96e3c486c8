"""A report on whatever was named: its text, its JSON, its page, and the files that were asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import ConfigError
from ...storage.codec import without_nan
from ...storage.run_record import Run
from ..data.comparison import Comparison
from ..data.inspections import NamedInspection, inspections_json, name_inspections
from ..data.load import load
from ..data.summarize import summarize, to_json
from ..html.page import render_html, write_file
from ..text.comparison import render_terminal
from ..text.inspections import render_inspections
from .csv import write_csv
from .png import write_png
from .svg import write_svg

__all__ = ["Report", "read_report", "write_outputs"]


@dataclass(frozen=True)
class Report:
    """Runs and inspections with the numbers that summarize them."""

    runs: list[Run]
    comparison: Comparison | None  # None without runs
    found: list[NamedInspection]
    problems: list[str]  # those that the comparison does not carry

    def html(self, live: float = 0) -> str:
        """The page; ``live``: the seconds after which it reloads itself, 0 for never."""
        inspections = [one.inspection for one in self.found]
        return render_html(self.comparison, inspections, problems=self.problems, live=live)

    def text(self) -> str:
        """Tables of at most 80 columns."""
        parts = [render_terminal(self.comparison)] if self.comparison else []
        parts += [render_inspections(self.found)] if self.found else []
        return "\n".join(parts) + "".join(f"! {problem}\n" for problem in self.problems)

    def json(self) -> str:
        """The numbers without the data of the charts."""
        data = to_json(self.comparison) if self.comparison else {"problems": self.problems}
        if self.found:
            data["inspections"] = without_nan(inspections_json(self.found))
        return json.dumps(data, indent=2, allow_nan=False)


def read_report(paths: Sequence[str | Path], baseline: str | None = None) -> Report:
    """Reads runs, comparisons and inspections, in any mixture, and summarizes them.

    Raises DataError where nothing can be read, ConfigError for a baseline that is none of the strategies.
    """
    runs, inspections, problems = load(paths)
    comparison = summarize(runs, baseline=baseline, problems=problems) if runs else None
    if comparison is None and baseline is not None:
        raise ConfigError(expected="runs, where --baseline is given", got="inspections only", do="leave --baseline out")
    found = name_inspections(inspections, len(comparison.strategies) if comparison else 0)
    return Report(runs, comparison, found, [] if comparison else problems)


def write_outputs(
    report: Report, *, out: str | None = None, csv: str | None = None, png: str | None = None, svg: str | None = None,
    dark: bool = False,
) -> list[str]:  # fmt: skip
    """Writes what is named and returns a line about each.

    Args:
        out: file of the page. csv: see `write_csv`. png: see `write_png`. svg: see `write_svg`.
        dark: draws dark pictures and figures.

    Raises OutputError where a file cannot be written, ConfigError where a package or a browser is missing.
    """
    html, scheme = report.html() if out or png or svg else "", "dark" if dark else "light"
    lines = [f"Report: {write_file(out, html)}"] if out else []
    if csv:
        lines += [f"Numbers: {path}" for path in write_csv(csv, report.comparison, report.runs, report.found)]
    if png:
        made = write_png(html, png, scheme=scheme)
        lines.append(f"Pictures: {made[0]}" if len(made) == 1 else f"Pictures: {len(made)} in {png}")
    if svg:
        lines.append(f"Figures: {len(write_svg(html, svg, scheme=scheme))} in {svg}")
    return lines
