"""``equipoise train``: one run of the lab's language model with one strategy."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import OutputError
from ..lab.config import RunConfig, to_toml
from ..lab.strategies import slug, strategy_of
from .settings import add_settings, read, settings

if TYPE_CHECKING:
    from ..records import Step

__all__ = ["EPILOG", "HELP", "add_arguments", "run", "train_in"]

RUN_FILES = ("record.jsonl", "checkpoints", "tensorboard")
LEAVING_SECONDS = 60.0
HELP = "train one model with one strategy; writes a record, checkpoints and TensorBoard events"
EPILOG = """\
strategies: none, micro, global, global+micro, sequence, document, sequences:N, shuffle, loss-free, deepseek-v3, and
details behind them: global@0.02 (coefficient), global:prefix (estimator), loss-free@1e-2 (rate), micro:sigmoid (gate),
micro->global:100 (change after 100 steps). A file can define its own, as [[strategy]] tables.

examples:
  equipoise train --strategy global@0.02
  equipoise train run.toml --steps 1000 --set train.checkpoint_every=200 --out runs/long
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE.toml", help="settings; all have defaults")
    parser.add_argument("--strategy", metavar="NAME", help="how the experts are balanced (default global+micro)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/train-STRATEGY-TIME")
    exists = parser.add_mutually_exclusive_group()
    exists.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on with the run in --out, if there is one"
    )
    exists.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    parser.add_argument("--plain", action="store_true", help="no progress bar")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    values = settings(arguments) | ({"strategy": arguments.strategy} if arguments.strategy else {})
    config = read(RunConfig, arguments, values)
    strategy_of(config)  # a wrong name answers before anything is loaded
    if arguments.print_config:
        print(to_toml(config))
        return 0
    folder = arguments.out or Path("runs") / f"train-{slug(config.strategy)}-{datetime.now():%Y%m%d-%H%M%S}"
    return train_in(folder, config, go_on=arguments.go_on, overwrite=arguments.overwrite, plain=arguments.plain)


def train_in(folder: Path, config: RunConfig, *, go_on: bool, overwrite: bool, plain: bool) -> int:
    """Trains in ``folder``, which this process then holds. A worker shows nothing and ends with its parent."""
    from ..lab.live import RunBar, open_console
    from ..lab.train import train
    from ..lab.workers import locked, orphaned

    def watch(step: Step) -> None:  # noqa: ARG001
        if orphaned():  # as if the parent had stopped this worker: it saves and ends
            os.kill(os.getpid(), signal.SIGTERM)

    with ExitStack() as stack:
        # a worker whose comparison was killed may need a moment to end; nobody else is waited for
        stack.enter_context(locked(folder, wait=LEAVING_SECONDS if plain else 0.0))
        if _is_run(folder) and overwrite:
            _remove(folder)
        elif _is_run(folder) and not go_on:
            raise OutputError(
                expected=f"a new folder, not {folder}",
                got="a run is in it",
                do="--continue, --overwrite, or another --out",
            )
        on_step = watch if plain else stack.enter_context(RunBar(config.train.steps, open_console()))
        try:
            train(config, folder, resume=go_on, on_step=on_step)
        except KeyboardInterrupt:
            print(f"saved; to go on: equipoise resume {folder}", file=sys.stderr)
            raise
    print(folder)
    return 0


def _is_run(folder: Path) -> bool:
    from ..records import RECORD_NAME

    return (folder / RECORD_NAME).exists()


def _remove(folder: Path) -> None:
    """The files of a run, by name; what else lies in the folder stays."""
    for name in RUN_FILES:
        path = folder / name
        try:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(expected=f"to remove {path}", got=error.strerror or str(error),
                              do="choose another --out") from None  # fmt: skip
