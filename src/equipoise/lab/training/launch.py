"""Runs as the command line starts them: alone or under torchrun, with progress, in a folder that one process holds."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from datetime import datetime
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar

from ...errors import ConfigError, EquipoiseError, OutputError
from ...storage.locks import locked
from ...storage.run_record import RECORD_NAME, read_run
from ...storage.set_aside import bring_back, set_aside
from ..comparison.progress import RunBar, open_console
from ..comparison.workers import after_each_step, is_worker
from ..config.schema import ParallelConfig, RunConfig, from_dict
from ..config.strategies import slug
from .distributed import RankContext, join, reported_by_rank_0
from .trainer import train

__all__ = ["Outcome", "launch_run", "resume_run", "with_ranks"]

ROOT = Path("runs")
RUN_FILES = ("record.jsonl", "checkpoints", "tensorboard", "tracking.json", "tokenizer.json")
LEAVING_SECONDS = 60.0
MOMENT = 2.0  # for rank 0 to print what is wrong: torchrun kills all ranks when one has ended
STOPPED = 130  # exit code after Ctrl-C

T = TypeVar("T")


class Outcome(NamedTuple):
    """Where a run is, and whether this process is the one that prints it."""

    folder: Path
    is_main: bool
    was_finished: bool = False  # before anything was done


def launch_run(
    config: RunConfig, layout: ParallelConfig, *, out: Path | None, resume: bool, overwrite: bool, plain: bool
) -> Outcome:
    """Trains ``config`` in ``out``, or in a new folder under ``runs/``.

    Args:
        layout: how the ranks that torchrun started divide the run.
        resume: continue the run in ``out``, if there is one.
        overwrite: remove the run in ``out`` first.
        plain: no progress bar; the run is a comparison's worker.

    Raises what `train` raises, ConfigError for a layout that does not fit the processes or a command that torchrun
    cannot restart, and OutputError for a folder that holds a run or that another process works in.
    """

    def work(context: RankContext) -> Outcome:
        _check_restarts(context, restartable=out is not None and resume)
        fresh = ROOT / f"train-{slug(config.strategy)}-{datetime.now():%Y%m%d-%H%M%S}"
        folder = out or context.from_rank_0(lambda: fresh)  # clocks differ
        return _train_in(folder, config, context, resume=resume, overwrite=overwrite, plain=plain)

    return with_ranks(layout, work)


def resume_run(folder: Path, layout: ParallelConfig, *, plain: bool) -> Outcome:
    """Continues the run in ``folder`` with the configuration that its record holds.

    Raises what ``launch_run`` raises, ConfigError for the folder of a comparison, and DataError where there is no run.
    """

    def earlier() -> tuple[str, dict]:
        if (folder / "comparison.json").exists():
            raise ConfigError(
                expected="the folder of one run",
                got=f"a comparison in {folder}",
                do=f"equipoise compare --resume {folder}",
            )
        run = read_run(folder)
        return run.status, run.header.config

    def work(context: RankContext) -> Outcome:
        status, stored = context.from_rank_0(earlier)
        if status == "finished":
            return Outcome(folder, context.is_main, was_finished=True)
        config = from_dict(RunConfig, stored)
        return _train_in(folder, config, context, resume=True, overwrite=False, plain=plain)

    return with_ranks(layout, work)


def with_ranks(layout: ParallelConfig, work: Callable[[RankContext], T]) -> T:
    """What ``work`` returns with the ranks of this process; an error that all ranks raise is printed by rank 0 alone.

    On several ranks an error ends the process, with the error's exit code.
    """
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        with join(layout) as context:
            return work(context)
    except EquipoiseError as error:
        if not several:
            raise
        if reported_by_rank_0(error):
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
    """Exits at once: threads of a backend may wait for ranks that are gone, and abort if the interpreter shuts down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _train_in(
    folder: Path, config: RunConfig, context: RankContext, *, resume: bool, overwrite: bool, plain: bool
) -> Outcome:
    """Trains in ``folder``, which rank 0 locks. A worker shows no progress and ends with its parent."""

    forget: list[Callable[[], None]] = []  # the run that was there, once a step of this one is done

    with ExitStack() as stack:

        def open_folder() -> None:
            # a worker whose comparison was killed may need a moment to end; other holders are not waited for
            stack.enter_context(locked(folder, wait=LEAVING_SECONDS if is_worker() else 0.0))
            bring_back(folder)
            if _is_run(folder) and overwrite:
                forget.append(stack.enter_context(set_aside(folder, RUN_FILES)))
            elif _is_run(folder) and not resume:
                raise OutputError(
                    expected=f"a new folder, not {folder}",
                    got="a run is in it",
                    do="--continue, --overwrite, or another --out",
                )

        context.from_rank_0(open_folder)
        shows = None
        if context.is_main and not plain:
            if config.model.biases:
                print(f"begins with the expert biases of {config.model.biases}", file=sys.stderr)
            shows = stack.enter_context(RunBar(config.train.steps, open_console()))
        try:
            train(config, folder, resume=resume, on_step=after_each_step(forget, shows), context=context)
        except KeyboardInterrupt:
            if context.is_main:
                print(f"saved; to go on: equipoise resume {folder}", file=sys.stderr)
            raise
    return Outcome(folder, context.is_main)


def _check_restarts(context: RankContext, *, restartable: bool) -> None:
    """torchrun runs the same command again when a rank has died: it has to find the run, and may not remove it."""
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not restartable:
        raise context.mark_shared(
            ConfigError(
                expected="--out FOLDER --continue with torchrun --max-restarts, which says this command again",
                got="a command that cannot go on with its own run",
                do="name the folder and add --continue, which begins where there is no run",
            )
        )


def _is_run(folder: Path) -> bool:
    return (folder / RECORD_NAME).exists()
