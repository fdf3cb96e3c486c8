"""``equipoise resume``: goes on with a run, or with a comparison, from the last checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..errors import ConfigError
from ..lab.config import RunConfig, from_dict
from ..records import read_run
from .train import train_in

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "go on with a run that was stopped, to the same numbers as if it never had been"
EPILOG = """\
example:
  equipoise resume runs/train-global-20260131-120000

The record holds the whole configuration, so nothing has to be repeated. A comparison goes on with
`equipoise compare --resume FOLDER`.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder of a run")
    parser.add_argument("--plain", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    if (arguments.folder / "comparison.json").exists():
        raise ConfigError(
            expected="the folder of one run",
            got=f"a comparison in {arguments.folder}",
            do=f"equipoise compare --resume {arguments.folder}",
        )
    earlier = read_run(arguments.folder)
    if earlier.status == "finished":
        print(f"{arguments.folder}: finished already, nothing to do")
        return 0
    config = from_dict(RunConfig, earlier.header.config)
    return train_in(arguments.folder, config, go_on=True, overwrite=False, plain=arguments.plain)
