"""``equipoise resume``: continues a run from its last checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

from .train import add_layout, layout_of

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "go on with a run that was stopped, to the same numbers as if it never had been"
EPILOG = """\
example:
  equipoise resume runs/train-global-20260131-120000

The record holds the whole configuration, so nothing has to be repeated. A comparison goes on with
`equipoise compare --resume FOLDER`. How many processes there were is not part of a run: it may go on with others,
  torchrun --nproc-per-node 4 -m equipoise resume runs/long --ep 2
to numbers that differ by rounding only (with the same processes they are the same to the last bit).
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--plain", action="store_true", help="no progress bar")
    add_layout(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..lab.training.launch import resume_run

    done = resume_run(arguments.folder, layout_of(arguments), plain=arguments.plain)
    if done.is_main:
        print(f"{done.folder}: finished already, nothing to do" if done.was_finished else done.folder)
    return 0
