"""Small runs side by side, each a process: which runs a comparison has, where they lie, and those left to train.

runs/diffuse-1a2b3c4d5e/      the digits are of the configuration: the same command finds its folder again
  sample-seed0/               one run: run.toml, record.jsonl, checkpoints, worker.log
  batch-seed0/ ...
  report.html
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, OutputError
from ...storage.codec import encode
from ...storage.locks import locked
from ...storage.run_record import RECORD_NAME, begun, read_run
from ...storage.set_aside import bring_back, set_aside
from ..config.loading import from_dict, to_toml
from ..config.strategies import slug
from .progress import RunBar, RunTable, open_console
from .workers import CONFIG_NAME, LOG_NAME, Job, Pool, after_each_step, is_worker, run_jobs, slots

__all__ = ["REPORT_NAME", "Outcome", "Room", "SmallJob"]

REPORT_NAME = "report.html"
LEAVING_SECONDS = 60.0  # that a worker of a comparison that was killed may need to end


@dataclass
class SmallJob(Job):
    """One run for the lab's pool of workers; ``config`` is the room's."""

    command: str = ""

    def arguments(self) -> list[str]:
        path = self.folder / CONFIG_NAME
        path.write_text(to_toml(self.config) + "\n", encoding="utf-8")
        return [self.command, str(path), "--strategy", self.config.strategy, "--out", str(self.folder), "--continue",
                "--plain"]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A comparison that ended: where, and 0 or the exit code of what failed."""

    folder: Path
    exit_code: int


@dataclass(frozen=True)
class Room:
    """What a comparison of small runs asks of a room.

    Args:
        command: of `equipoise`, that trains one run with ``--strategy``.
        task: as a run's header has it.
        config_type: its configuration, with a table ``train`` and a ``strategy``.
        named: raises ConfigError for a configuration whose strategy cannot be.
        check: reads the data and raises for configurations that cannot run on it.
        train: a configuration and a folder -> the folder, as `train_small`.
        files: that a run leaves, beside the usual ones and its checkpoints.
        example: two strategies, for an error message.
    """

    command: str
    task: str
    config_type: type
    named: Callable[[Any], object]
    check: Callable[[Sequence[Any]], None]
    train: Callable[..., Path]
    files: tuple[str, ...] = ()
    example: str = ""

    def folder_of(self, config: Any, root: Path = Path("runs")) -> Path:
        """A folder for each configuration; strategy and seed tell the runs in it apart.

        >>> from equipoise.lab.diffusion.comparison import ROOM, DiffusionConfig
        >>> a, b = DiffusionConfig(strategy="batch"), DiffusionConfig(strategy="sample")
        >>> ROOM.folder_of(a) == ROOM.folder_of(b)
        True
        """
        plain = encode(replace(config, strategy="", train=replace(config.train, seed=0)))
        return root / f"{self.command}-{hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]}"

    def plan(self, config: Any, strategies: Sequence[str], seeds: int, folder: Path) -> list[SmallJob]:
        """A job for each strategy and seed, all of the first seed first. Raises ConfigError for a wrong name.

        >>> from equipoise.lab.diffusion.comparison import ROOM, DiffusionConfig
        >>> [job.name for job in ROOM.plan(DiffusionConfig(), ("sample", "batch"), 2, Path("runs"))]
        ['sample-seed0', 'batch-seed0', 'sample-seed1', 'batch-seed1']
        """
        for given, wanted in ((len(strategies), "at least one strategy"), (seeds, "--seeds of 1 or more")):
            if given < 1:
                do = f"for example --strategies {self.example} --seeds 3"
                raise ConfigError(expected=wanted, got=str(given), do=do)
        jobs = []
        for seed in range(config.train.seed, config.train.seed + seeds):
            for name in dict.fromkeys(strategies):
                run = replace(config, strategy=name, train=replace(config.train, seed=seed))
                self.named(run)
                place = f"{slug(name)}-seed{seed}"
                jobs.append(SmallJob(place, folder / place, run, command=self.command))
        return jobs

    def compare(
        self, config: Any, strategies: Sequence[str], seeds: int, *, out: Path | None, overwrite: bool, workers: int
    ) -> Outcome:
        """Trains what is not finished of a comparison, with progress on stderr.

        Raises KeyboardInterrupt after everything was saved, OutputError for a folder that another process works in, and
        what `plan` and ``check`` raise.
        """
        console, folder = open_console(), out or self.folder_of(config)
        jobs = self.plan(config, strategies, seeds, folder)
        self.check([job.config for job in jobs])
        with locked(folder):
            for job in jobs:
                if overwrite:
                    with set_aside(job.folder, self._written):
                        pass
                job.tail.read()
                job.status = "finished" if self._finished(job) else job.status
            count = sum(job.status == "waiting" for job in jobs)
            console.print(f"{count} of {len(jobs)} runs to train in {folder}", markup=False, soft_wrap=True)
            try:
                with RunTable(list(jobs), console) as table:
                    run_jobs(Pool(list(jobs), slots(config.train.threads, workers)), table, lambda _: None)
            except KeyboardInterrupt:
                console.print("every run is saved; the same command goes on", markup=False, soft_wrap=True)
                raise
        codes = {max(job.exit_code, 1) for job in jobs if job.status == "failed"}
        return Outcome(folder, (codes.pop() if len(codes) == 1 else 1) if codes else 0)

    def train_one(self, config: Any, folder: Path, *, resume: bool, overwrite: bool, plain: bool) -> Path:
        """One run in this process; ``plain``: without a bar, as the worker of a comparison that ends with it."""
        self.check([config])

        forget: list[Callable[[], None]] = []  # the run that was there, once a step of this one is done

        with ExitStack() as stack:
            stack.enter_context(locked(folder, wait=LEAVING_SECONDS if is_worker() else 0.0))
            bring_back(folder)
            if overwrite:
                forget.append(stack.enter_context(set_aside(folder, self._written)))
            shows = None if plain else stack.enter_context(RunBar(config.train.steps, open_console()))
            try:
                return self.train(config, folder, resume=resume, on_step=after_each_step(forget, shows))
            except KeyboardInterrupt:
                print(f"saved in {folder}; the same command with --continue goes on", file=sys.stderr)
                raise

    def _finished(self, job: SmallJob) -> bool:
        """Raises OutputError for a run of another configuration in the job's folder, DataError for one of another task
        or one that cannot be read: nobody could go on with it."""
        if not begun(job.folder):
            return False
        run = read_run(job.folder, self.task)
        if from_dict(self.config_type, run.header.config) != job.config:
            raise OutputError(
                expected=f"a run of this configuration in {job.folder}",
                got="one of another",
                do="choose another --out, or --overwrite to train it again",
            )
        return run.status == "finished"

    @property
    def _written(self) -> list[str]:
        """The files of a run, by name; other files in its folder are somebody else's."""
        return ["checkpoints", RECORD_NAME, CONFIG_NAME, LOG_NAME, *self.files]
