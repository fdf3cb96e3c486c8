"""``equipoise report RUN...``: the table, the page, the numbers and the pictures of runs and inspections."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError

if TYPE_CHECKING:
    from ..report.data.comparison import Comparison
    from ..report.data.inspections import Named
    from ..storage.run_record import Run

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "show runs, comparisons and inspections: a table here, or a page that holds everything"
EPILOG = """\
examples:
  equipoise report runs/compare-20260101-120000 --out report.html
  equipoise report runs/a runs/b inspections/olmoe --out report.html --csv numbers/ --png pictures/
  equipoise report runs/now --watch               the page follows the run; Ctrl-C, or the run's end, ends it
"""
EVERY = 10.0  # seconds
LOOK = 0.5  # seconds between two looks at the files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the folder of a run, of a comparison (all runs in it) or of an inspection, or a record file; any mixture",
    )
    parser.add_argument("--out", metavar="FILE", help="also write one self-contained HTML page, e.g. report.html")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    parser.add_argument(
        "--csv", metavar="PATH", help="write the numbers: FILE.csv, or a folder for all that was recorded"
    )
    parser.add_argument("--png", metavar="PATH", help="draw each section into this folder, or the page into FILE.png")
    parser.add_argument("--dark", action="store_true", help="dark pictures")
    parser.add_argument("--watch", action="store_true",
                        help="write the page again whenever something was recorded, until the runs end")  # fmt: skip
    parser.add_argument(
        "--every", type=float, default=EVERY, metavar="SECONDS", help="with --watch, at most so often (10)"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="strategy that differences are taken from (default: micro, else the first)"
    )


@dataclass(frozen=True)
class Report:
    """What was read, and the numbers of it."""

    runs: list[Run]
    comparison: Comparison | None
    found: list[Named]
    problems: list[str]  # those that the comparison does not carry

    def html(self, live: float = 0) -> str:
        from ..report.html.page import render_html

        inspections = [one.inspection for one in self.found]
        return render_html(self.comparison, inspections, problems=self.problems, live=live)

    def text(self) -> str:
        from ..report import render_terminal
        from ..report.text.inspections import render_inspections

        parts = [render_terminal(self.comparison)] if self.comparison else []
        parts += [render_inspections(self.found)] if self.found else []
        return "\n".join(parts) + "".join(f"! {problem}\n" for problem in self.problems)

    def json(self) -> str:
        from ..report import to_json
        from ..report.data.inspections import inspections_json
        from ..report.data.summarize import null

        data = to_json(self.comparison) if self.comparison else {"problems": self.problems}
        if self.found:
            data["inspections"] = null(inspections_json(self.found))
        return json.dumps(data, indent=2, allow_nan=False)


def read(paths: Sequence[str], baseline: str | None) -> Report:
    from ..report import load, summarize
    from ..report.data.inspections import named

    runs, inspections, problems = load(paths)
    comparison = summarize(runs, baseline=baseline, problems=problems) if runs else None
    if comparison is None and baseline is not None:
        raise ConfigError(expected="runs, where --baseline is given", got="inspections only", do="leave --baseline out")
    found = named(inspections, len(comparison.strategies) if comparison else 0)
    return Report(runs, comparison, found, [] if comparison else problems)


def run(args: argparse.Namespace) -> int:
    from ..report.html.page import write_file

    if args.watch:
        return _watch(args)
    report = read(args.runs, args.baseline)
    html = report.html() if args.out or args.png else ""
    written = [f"Report: {write_file(args.out, html)}"] if args.out else []
    written += _others(args, report, html)
    if args.json:
        print(report.json())
        return 0
    print(report.text(), end="")
    if written:
        print("\n" + "\n".join(written))
    return 0


def _others(args: argparse.Namespace, report: Report, html: str) -> list[str]:
    """Numbers and pictures, as far as they were asked for."""
    from ..report.export.csv import write_csv
    from ..report.export.png import write_pictures

    done = []
    if args.csv:
        done += [f"Numbers: {path}" for path in write_csv(args.csv, report.comparison, report.runs, report.found)]
    if args.png:
        made = write_pictures(html, args.png, scheme="dark" if args.dark else "light")
        done.append(f"Pictures: {made[0]}" if len(made) == 1 else f"Pictures: {len(made)} in {args.png}")
    return done


def _watch(args: argparse.Namespace) -> int:
    """Rewrites the page when a file behind it changes. The last page, also after Ctrl-C, no longer refreshes itself."""
    from ..report.export.follow import goes_on, signature
    from ..report.html.page import write_file

    if args.json:
        raise ConfigError(expected="--watch or --json", got="both", do="leave one out: --watch writes a page")
    if not args.every > 0:
        raise ConfigError(expected="--every above 0", got=str(args.every), do="10 is usual")
    page = Path(args.out) if args.out else _beside(Path(args.runs[0]))
    before, report, said = None, None, ""
    try:
        while True:
            now = signature(args.runs)
            if now != before:
                before = now
                try:
                    report = read(args.runs, args.baseline)
                except DataError as error:  # a run that begins in a moment has no header yet
                    report, text = None, f"waiting: expected {error.expected}, got {error.got}"
                else:
                    live = goes_on(args.runs, report.runs)
                    write_file(page, report.html(live=args.every if live else 0))
                    if not live:
                        break
                    text = f"{page}: {_progress(report)}"
                if text != said:
                    print(text, file=sys.stderr)
                    said = text
                time.sleep(args.every)
            else:
                time.sleep(LOOK if args.every > LOOK else args.every)
    except KeyboardInterrupt:
        if report is not None:
            write_file(page, report.html())
        raise
    for line in _others(args, report, report.html()):
        print(line)
    print(f"Report: {page}")
    return 0


def _beside(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "report.html"


def _progress(report: Report) -> str:
    states: dict[str, int] = {}
    for one in report.runs:
        states[one.status] = states.get(one.status, 0) + 1
    last = max((one.steps[-1].step for one in report.runs if one.steps), default=0)
    return ", ".join(f"{count} {status}" for status, count in states.items()) + f", step {last}"
