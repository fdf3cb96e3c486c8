"""Strategies side by side: runs of one seed share their weights, images and noise, and differ in their second layers.

runs/diffuse-1a2b3c4d5e/      the digits are of the configuration: the same command finds its folder again
  sample-seed0/               one run: run.toml, record.jsonl, checkpoints, samples.png, worker.log
  batch-seed0/ ...
  report.html
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import ConfigError, DataError, OutputError
from ...functional.expert_choice import tokens_per_expert
from ...storage.codec import encode
from ...storage.files import output_errors
from ...storage.locks import locked
from ...storage.run_record import RECORD_NAME, Step, read_run
from ..comparison.progress import RunBar, RunTable, open_console
from ..comparison.workers import CONFIG_NAME, LOG_NAME, Job, Pool, orphaned, run_jobs, slots
from ..config.loading import from_dict, to_toml
from ..config.strategies import slug
from .config import DiffusionConfig
from .images import Images, load_images
from .strategies import read_strategy
from .trainer import SAMPLES_NAME, TASK, train

__all__ = ["REPORT_NAME", "DiffusionJob", "Outcome", "check", "compare", "folder_of", "plan", "train_one"]

REPORT_NAME = "report.html"
RUN_FILES = (RECORD_NAME, SAMPLES_NAME, CONFIG_NAME, LOG_NAME)  # beside the checkpoints
LEAVING_SECONDS = 60.0  # that a worker of a comparison that was killed may need to end


@dataclass
class DiffusionJob(Job):
    """One run for the lab's pool of workers; ``config`` is a `DiffusionConfig`."""

    config: DiffusionConfig

    def arguments(self) -> list[str]:
        path = self.folder / CONFIG_NAME
        path.write_text(to_toml(self.config) + "\n", encoding="utf-8")
        return ["diffuse", str(path), "--strategy", self.config.strategy, "--out", str(self.folder), "--continue",
                "--plain"]  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """A comparison that ended: where, and 0 or the exit code of what failed."""

    folder: Path
    exit_code: int


def folder_of(config: DiffusionConfig, root: Path = Path("runs")) -> Path:
    """A folder for each configuration; strategy and seed tell the runs in it apart.

    >>> a, b = DiffusionConfig(strategy="batch"), DiffusionConfig(strategy="sample")
    >>> folder_of(a) == folder_of(b)
    True
    """
    plain = encode(replace(config, strategy="", train=replace(config.train, seed=0)))
    return root / f"diffuse-{hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:10]}"


def plan(config: DiffusionConfig, strategies: Sequence[str], seeds: int, folder: Path) -> list[DiffusionJob]:
    """A job for each strategy and seed, all strategies of the first seed first. Raises ConfigError for a wrong name.

    >>> [job.name for job in plan(DiffusionConfig(), ("sample", "batch"), 2, Path("runs"))]
    ['sample-seed0', 'batch-seed0', 'sample-seed1', 'batch-seed1']
    """
    for given, wanted in ((len(strategies), "at least one strategy"), (seeds, "--seeds of 1 or more")):
        if given < 1:
            raise ConfigError(expected=wanted, got=str(given), do="for example --strategies sample,batch --seeds 3")
    jobs = []
    for seed in range(config.train.seed, config.train.seed + seeds):
        for name in dict.fromkeys(strategies):
            run = replace(config, strategy=name, train=replace(config.train, seed=seed))
            read_strategy(name).layer(config.model)
            jobs.append(DiffusionJob(f"{slug(name)}-seed{seed}", folder / f"{slug(name)}-seed{seed}", run))
    return jobs


def check(config: DiffusionConfig, images: Images) -> None:
    """Raises InputError for a pool smaller than its experts, ConfigError for one that no batch can be cut into."""
    pool = read_strategy(config.strategy).pool
    if pool is None:
        return
    samples = {"sample": 1, "global_batch": config.train.images}.get(str(pool), pool)
    assert isinstance(samples, int)
    if config.train.images % samples:
        raise ConfigError(
            expected="pools that train.images divides into",
            got=f"{config.strategy} with images = {config.train.images}",
            do="change one of them",
        )
    tokens_per_expert(samples * (images.shape[1] // config.model.patch) ** 2, config.model.experts,
                      config.model.capacity)  # fmt: skip


def compare(
    config: DiffusionConfig, strategies: Sequence[str], seeds: int, *, out: Path | None, overwrite: bool, workers: int
) -> Outcome:
    """Trains what is not finished of a comparison, with progress on stderr.

    Raises KeyboardInterrupt after everything was saved, OutputError for a folder that another process works in, and
    what `plan`, `check` and `load_images` raise.
    """
    console, folder = open_console(), out or folder_of(config)
    jobs = plan(config, strategies, seeds, folder)
    images = load_images(config.data, config.model.patch)
    for job in jobs:
        check(job.config, images)
    with locked(folder):
        for job in jobs:
            if overwrite:
                _remove(job.folder)
            job.tail.read()
            job.status = "finished" if _finished(job) else job.status
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


def train_one(config: DiffusionConfig, folder: Path, *, resume: bool, overwrite: bool, plain: bool) -> Path:
    """One run in this process; ``plain``: without a bar, as the worker of a comparison that ends with it."""
    check(config, load_images(config.data, config.model.patch))

    def watch(step: Step) -> None:  # noqa: ARG001
        if orphaned():  # as if the parent had stopped this worker: it saves and ends
            os.kill(os.getpid(), signal.SIGTERM)

    with ExitStack() as stack:
        stack.enter_context(locked(folder, wait=LEAVING_SECONDS if plain else 0.0))
        if overwrite:
            _remove(folder)
        on_step: Callable[[Step], None] = watch
        if not plain:
            on_step = stack.enter_context(RunBar(config.train.steps, open_console()))
        try:
            return train(config, folder, resume=resume, on_step=on_step)
        except KeyboardInterrupt:
            print(f"saved in {folder}; the same command with --continue goes on", file=sys.stderr)
            raise


def _finished(job: DiffusionJob) -> bool:
    """Raises OutputError for a run of another configuration in the job's folder, which no resuming could go on with."""
    try:
        run = read_run(job.folder, TASK)
    except DataError:
        return False
    if from_dict(DiffusionConfig, run.header.config) != job.config:
        raise OutputError(
            expected=f"a run of this configuration in {job.folder}",
            got="one of another",
            do="choose another --out, or --overwrite to train it again",
        )
    return run.status == "finished"


def _remove(folder: Path) -> None:
    """Removes the files of a run, by name; other files in the folder stay."""
    with output_errors(folder, "choose another --out"):
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        for name in RUN_FILES:
            (folder / name).unlink(missing_ok=True)
