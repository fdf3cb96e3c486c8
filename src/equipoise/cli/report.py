"""``equipoise report RUN...``: tables, page, CSV and pictures of runs and inspections."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..errors import ConfigError, DataError

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "show runs, comparisons and inspections: a table here, or a page that holds everything"
EPILOG = """\
examples:
  equipoise report runs/compare-20260101-120000 --out report.html
  equipoise report runs/a runs/b inspections/olmoe --out report.html --csv numbers/ --png pictures/ --svg figures/
  equipoise report inspections/step-*             checkpoints of one model: curves through its training
  equipoise report runs/now --watch               the page follows the run; Ctrl-C, or the run's end, ends it
"""
EVERY = 10.0  # seconds


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
    parser.add_argument("--svg", metavar="FOLDER", help="take each figure out of the page, as an SVG file of its own")
    parser.add_argument("--dark", action="store_true", help="dark pictures and figures")
    parser.add_argument("--watch", action="store_true",
                        help="write the page again whenever something was recorded, until the runs end")  # fmt: skip
    parser.add_argument(
        "--every", type=float, default=EVERY, metavar="SECONDS", help="with --watch, at most so often (10)"
    )
    parser.add_argument(
        "--baseline", metavar="NAME", help="strategy that differences are taken from (default: micro, else the first)"
    )


def run(args: argparse.Namespace) -> int:
    from ..report.export.follow import follow
    from ..report.export.outputs import read_report, write_outputs

    if args.watch:
        _check_watch(args)
        report, page = follow(
            args.runs, args.out, baseline=args.baseline, every=args.every, say=lambda line: print(line, file=sys.stderr)
        )
        written = write_outputs(report, csv=args.csv, png=args.png, svg=args.svg, dark=args.dark)
        print("\n".join([*written, f"Report: {page}"]))
        return 0
    report = read_report(args.runs, args.baseline)
    written = write_outputs(report, out=args.out, csv=args.csv, png=args.png, svg=args.svg, dark=args.dark)
    if args.json:
        print(report.json())
    else:
        print(report.text(), end="")
        if written:
            print("\n" + "\n".join(written))
    if missing := [path for path in args.runs if not Path(path).exists()]:
        print(f"equipoise: left out, not there: {', '.join(map(str, missing))}", file=sys.stderr)
        return DataError.exit_code
    return 0


def _check_watch(args: argparse.Namespace) -> None:
    if args.json:
        raise ConfigError(expected="--watch or --json", got="both", do="leave one out: --watch writes a page")
    if not args.every > 0:
        raise ConfigError(expected="--every above 0", got=str(args.every), do="10 is usual")
