"""``equipoise report RUN...``: the table and the page of runs that were trained before."""

from __future__ import annotations

import argparse
import json

__all__ = ["HELP", "add_arguments", "run"]

HELP = "compare finished or running runs: a table here, or a page that holds everything"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, a comparison's folder (all runs in it), or a record file; several are compared",
    )
    parser.add_argument("--out", metavar="FILE", help="also write one self-contained HTML page, e.g. report.html")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON instead of tables")
    parser.add_argument(
        "--baseline", metavar="NAME", help="strategy that differences are taken from (default: micro, else the first)"
    )


def run(args: argparse.Namespace) -> int:
    from ..report import load_runs, render_terminal, summarize, to_json, write_html

    runs, problems = load_runs(args.runs)
    comparison = summarize(runs, baseline=args.baseline, problems=problems)
    page = write_html(comparison, args.out) if args.out else None
    if args.json:
        print(json.dumps(to_json(comparison), indent=2, allow_nan=False))
        return 0
    print(render_terminal(comparison), end="")
    if page is not None:
        print(f"\nReport: {page}")
    return 0
