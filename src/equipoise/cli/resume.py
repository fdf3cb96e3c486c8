"""``equipoise resume``: goes on with a run, or with a comparison, from the last checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..lab.config.schema import RunConfig, from_dict
from ..storage.run_record import read_run
from .train import add_layout, on_ranks, train_in

if TYPE_CHECKING:
    from ..lab.training.distributed import World

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
    return on_ranks(arguments, lambda world: _resume(arguments, world))


def _resume(arguments: argparse.Namespace, world: World) -> int:
    status, stored = world.decide(lambda: _earlier(arguments.folder))
    if status == "finished":
        if world.writes:
            print(f"{arguments.folder}: finished already, nothing to do")
        return 0
    config = from_dict(RunConfig, stored)
    return train_in(arguments.folder, config, world, go_on=True, overwrite=False, plain=arguments.plain)


def _earlier(folder: Path) -> tuple[str, dict[str, Any]]:
    """Status and configuration of the run in the folder."""
    if (folder / "comparison.json").exists():
        raise ConfigError(
            expected="the folder of one run",
            got=f"a comparison in {folder}",
            do=f"equipoise compare --resume {folder}",
        )
    earlier = read_run(folder)
    return earlier.status, earlier.header.config
