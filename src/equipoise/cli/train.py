"""``equipoise train``: one run of the lab's language model with one strategy."""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..errors import ConfigError, EquipoiseError, OutputError
from ..lab.config.schema import ParallelConfig, RunConfig, to_toml
from ..lab.config.strategies import slug, strategy_of
from .settings import add_settings, read, settings

if TYPE_CHECKING:
    from ..lab.training.distributed import World
    from ..storage.run_record import Step

__all__ = ["EPILOG", "HELP", "add_arguments", "add_layout", "on_ranks", "run", "train_in"]

RUN_FILES = ("record.jsonl", "checkpoints", "tensorboard", "tracking.json", "tokenizer.json")
LEAVING_SECONDS = 60.0
MOMENT = 2.0  # that the first rank has to say what is wrong: torchrun ends all ranks when one has ended
STOPPED = 130  # what the command returns after Ctrl-C
HELP = "train one model with one strategy; writes a record, checkpoints and TensorBoard events"
EPILOG = """\
strategies: none, micro, global, global+micro, sequence, document, sequences:N, shuffle, loss-free, deepseek-v3, and
details behind them: global@0.02 (coefficient), global:prefix (estimator), loss-free@1e-2 (rate), micro:sigmoid (gate),
micro->global:100 (change after 100 steps). A file can define its own, as [[strategy]] tables.

examples:
  equipoise train --strategy global@0.02
  equipoise train run.toml --steps 1000 --set train.checkpoint_every=200 --out runs/long
  equipoise train --model FOLDER --strategy global    goes on with a Hugging Face model (see `equipoise compare --help`)
  equipoise export runs/long FOLDER                   makes one of a run

several processes share a run under torchrun, each an equal part of every step's micro-batches: the loss curve is that
of one process, and a run may go on with another number of them. On one machine:
  torchrun --nproc-per-node 4 -m equipoise train run.toml --ep 2 --out runs/long
on two machines of 8, the same two lines on each, HOST being one of them; a rank that dies is started again, and all go
on from the last checkpoint (the first machine's --out folder is the one that counts):
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \
      -m equipoise train run.toml --ep 8 --fsdp --out runs/long --continue
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
    add_layout(parser)
    add_settings(parser)


def add_layout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes (under torchrun; see below)")
    group.add_argument("--dp", type=int, default=0, metavar="N", help="data ranks (default: all processes)")
    group.add_argument("--ep", type=int, default=1, metavar="N",
                       help="ranks that share out the experts of a layer; divides --dp (default 1)")  # fmt: skip
    group.add_argument("--fsdp", action="store_true", help="shard parameters, gradients and moments over the ranks")


def run(arguments: argparse.Namespace) -> int:
    values = settings(arguments) | ({"strategy": arguments.strategy} if arguments.strategy else {})
    config = read(RunConfig, arguments, values)
    strategy_of(config)  # a wrong name answers before anything is loaded
    if arguments.print_config:
        print(to_toml(config))
        return 0

    def work(world: World) -> int:
        _check_restarts(arguments, world)
        fresh = Path("runs") / f"train-{slug(config.strategy)}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = arguments.out or world.decide(lambda: fresh)  # clocks differ
        return train_in(folder, config, world, go_on=arguments.go_on, overwrite=arguments.overwrite,
                        plain=arguments.plain)  # fmt: skip

    return on_ranks(arguments, work)


def on_ranks(arguments: argparse.Namespace, work: Callable[[World], int]) -> int:
    """What ``work`` returns, with the ranks of this process; an error that all ranks meet is said by the first."""
    from ..lab.training.distributed import join, said_elsewhere

    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        with join(ParallelConfig(dp=arguments.dp, ep=arguments.ep, fsdp=arguments.fsdp)) as world:
            return work(world)
    except EquipoiseError as error:
        if not several:
            raise
        if said_elsewhere(error):
            with suppress(KeyboardInterrupt):
                time.sleep(MOMENT)
        else:
            print(f"equipoise: {error}", file=sys.stderr)
        _leave(error.exit_code)
    except KeyboardInterrupt:
        if not several:
            raise
        _leave(STOPPED)


def _leave(code: int) -> NoReturn:
    """Ends at once: threads of a backend may wait for ranks that are gone, and abort where nobody waits for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def train_in(folder: Path, config: RunConfig, world: World, *, go_on: bool, overwrite: bool, plain: bool) -> int:
    """Trains in ``folder``, which the first rank then holds. A worker shows nothing and ends with its parent."""
    from ..lab.comparison.progress import RunBar, open_console
    from ..lab.comparison.workers import orphaned
    from ..lab.training.trainer import train
    from ..storage.locks import locked

    def watch(step: Step) -> None:  # noqa: ARG001
        if orphaned():  # as if the parent had stopped this worker: it saves and ends
            os.kill(os.getpid(), signal.SIGTERM)

    with ExitStack() as stack:

        def open_folder() -> None:
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

        world.decide(open_folder)
        shows = world.writes and not plain
        if shows and config.model.biases:
            print(f"begins with the expert biases of {config.model.biases}", file=sys.stderr)
        on_step = stack.enter_context(RunBar(config.train.steps, open_console())) if shows else watch
        try:
            train(config, folder, resume=go_on, on_step=on_step, world=world)
        except KeyboardInterrupt:
            if world.writes:
                print(f"saved; to go on: equipoise resume {folder}", file=sys.stderr)
            raise
    if world.writes:
        print(folder)
    return 0


def _check_restarts(arguments: argparse.Namespace, world: World) -> None:
    """torchrun says the same command again when a rank has died: it has to find the run, and may not remove it."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (arguments.out and arguments.go_on):
        raise world.alike(
            ConfigError(
                expected="--out FOLDER --continue with torchrun --max-restarts, which says this command again",
                got="a command that cannot go on with its own run",
                do="name the folder and add --continue, which begins where there is no run",
            )
        )


def _is_run(folder: Path) -> bool:
    from ..storage.run_record import RECORD_NAME

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
