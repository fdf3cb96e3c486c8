"""Worker processes: a queue of runs, so many at a time, each a process of its own on cores of its own.

A worker is ``python -m equipoise train``; it writes its record and the parent reads it, there is no other channel. The
parent stops a worker with SIGTERM, which saves; a worker whose parent has died stops itself the same way.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError, OutputError
from ...storage.run_record import RECORD_NAME, Step
from ..config.schema import to_toml
from .record_tail import RecordTail

__all__ = ["CONFIG_NAME", "LOG_NAME", "PARENT", "Job", "Pool", "Runner", "View", "after_each_step", "cores",
           "is_worker", "orphaned", "run_jobs", "slots"]  # fmt: skip

CONFIG_NAME = "run.toml"
LOG_NAME = "worker.log"
TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")  # a worker is a run of its own, also under torchrun
PARENT = "EQUIPOISE_PARENT"  # the process id that a worker belongs to
SAVING_SECONDS = 120.0  # that a stopped worker has to write its checkpoint
POLL_SECONDS = 0.5  # between two polls of the workers


@dataclass
class Job:
    """One run of a comparison: where it is, how far it is, and how it ended.

    A subclass does other work than a training, as another command: it has another ``config``, `steps`, `threads` and
    `arguments`.
    """

    name: str
    folder: Path
    config: Any  # a RunConfig
    status: str = "waiting"  # waiting, running, finished, interrupted, failed
    error: str = ""
    exit_code: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)
    slot: int = -1
    node: str = ""  # of a cluster, where it runs
    tail: RecordTail = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.tail = RecordTail(self.folder / RECORD_NAME)

    @property
    def steps(self) -> int:
        return self.config.train.steps

    @property
    def threads(self) -> int:
        return self.config.train.threads

    def arguments(self) -> list[str]:
        """What follows ``python -m equipoise``; writes the file that the command reads into the folder."""
        path = self.folder / CONFIG_NAME
        path.write_text(to_toml(self.config) + "\n", encoding="utf-8")
        return ["train", str(path), "--out", str(self.folder), "--continue", "--plain"]


class Pool:
    """Starts waiting jobs on free slots, records how they end, and stops them all.

    ``slots`` is a list of core sets; a job runs pinned to the one of its slot, which the next job takes over.
    """

    def __init__(self, jobs: list[Job], slots: list[set[int]]) -> None:
        self.jobs, self.slots = jobs, slots

    @property
    def running(self) -> list[Job]:
        return [job for job in self.jobs if job.status == "running"]

    def poll(self) -> list[Job]:
        """Polls all workers and starts waiting jobs. Returns the jobs whose status changed."""
        changed = [job for job in self.running if self._ended(job)]
        free = sorted(set(range(len(self.slots))) - {job.slot for job in self.running})
        waiting = [job for job in self.jobs if job.status == "waiting"]
        for job, slot in zip(waiting, free, strict=False):
            self._start(job, slot)
            changed.append(job)
        for job in self.jobs:
            job.tail.read()
        return changed

    def stop(self) -> None:
        """Asks every worker to save and end, and waits. Those that take longer than SAVING_SECONDS are killed."""
        for job in self.running:
            _send(job, signal.SIGTERM)
        deadline = time.monotonic() + SAVING_SECONDS
        try:
            while self.running and time.monotonic() < deadline:
                for job in self.running:
                    self._ended(job)
                time.sleep(0.05)
        finally:  # also when the user presses Ctrl-C once more
            for job in self.running:
                _send(job, signal.SIGKILL)
                assert job.process is not None
                job.process.wait()
                job.status = "interrupted"

    def _start(self, job: Job, slot: int) -> None:
        try:
            job.folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "equipoise", *job.arguments()]
            log = open(job.folder / LOG_NAME, "ab")
        except OSError as error:
            raise OutputError(
                expected=f"to write {job.folder}",
                got=error.strerror or str(error),
                do="free space or choose another folder",
            ) from None
        threads = str(job.threads)
        alone = {name: value for name, value in os.environ.items() if name not in TORCHRUN}
        quiet = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        with log:
            job.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=alone | quiet | {PARENT: str(os.getpid())},
                process_group=0,  # Ctrl-C reaches the parent alone, which stops the workers in order
            )
        if hasattr(os, "sched_setaffinity") and self.slots[slot]:
            with contextlib.suppress(OSError):  # it has already ended, or this machine forbids it: only speed is lost
                os.sched_setaffinity(job.process.pid, self.slots[slot])
        job.status, job.slot, job.error = "running", slot, ""

    def _ended(self, job: Job) -> bool:
        assert job.process is not None
        code = job.process.poll()
        if code is None:
            return False
        job.tail.read()
        job.exit_code = code
        if code == 0:
            job.status = "finished"
        elif code in (130, -signal.SIGTERM):  # the latter: stopped before it could even begin
            job.status = "interrupted"
        else:
            job.status, job.error = "failed", last_words(job.folder / LOG_NAME, code)
        return True


class Runner(Protocol):
    """What trains jobs: a `Pool` of processes here, or a `ray_cluster.RayPool`."""

    jobs: list[Job]

    @property
    def running(self) -> list[Job]: ...
    def poll(self) -> list[Job]: ...
    def stop(self) -> None: ...


class View(Protocol):
    """Displays the jobs; updated after each poll with those whose status changed."""

    def update(self, changed: list[Job]) -> None: ...


def run_jobs(pool: Runner, view: View, saved: Callable[[list[Job]], None]) -> None:
    """Trains what is not finished. A failed run does not stop the others; Ctrl-C stops all of them, saved.

    Args:
        saved: called with the jobs whose status changed, after each poll in which some did, and when all are stopped.

    Raises KeyboardInterrupt after everything has been saved.
    """
    try:
        while any(job.status in ("waiting", "running") for job in pool.jobs):
            if changed := pool.poll():
                saved(changed)
            view.update(changed)
            time.sleep(POLL_SECONDS)
    except BaseException:
        stopped = pool.running
        pool.stop()
        with contextlib.suppress(OutputError):  # the disk is full: the runs matter more than what is written about them
            saved(stopped)
        raise


def slots(threads: int, workers: int = 0) -> list[set[int]]:
    """Core sets for the workers: ``threads`` cores each, all cores unless ``workers`` is fewer.

    Raises ConfigError for fewer than no worker, with which nothing would ever be trained.
    """
    if workers < 0:
        raise ConfigError(
            expected="--workers of 1 or more processes", got=str(workers), do="leave it out for one per core"
        )
    free = cores()
    most = max(len(free) // threads, 1)
    count = workers or most
    if count > most:  # more workers than cores: nothing to pin
        return [set() for _ in range(count)]
    return [set(free[i * threads : (i + 1) * threads]) for i in range(count)]


def cores() -> list[int]:
    """The cores this process may use; the same numbers that `taskset` shows."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def is_worker() -> bool:
    """Whether a comparison started this process."""
    return PARENT in os.environ


def orphaned() -> bool:
    """Whether this process is a worker whose parent has died."""
    parent = os.environ.get(PARENT)
    return parent is not None and parent != str(os.getppid())


def after_each_step(began: list[Callable[[], None]], shows: Callable[[Step], None] | None) -> Callable[[Step], None]:
    """What a run is to call with each step.

    Args:
        began: called once, after the first step, and taken out of the list.
        shows: its progress; a worker has none, and ends with its parent instead.
    """

    def on_step(step: Step) -> None:
        while began:
            began.pop()()
        if shows is not None:
            shows(step)
        elif orphaned():  # as if the parent had stopped this worker: it saves and ends
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


def last_words(log: Path, code: int) -> str:
    """The last output of a failed worker: its three-part error, or the last line of its traceback."""
    if code < 0:
        return f"killed by signal {-code}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    try:
        lines = log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()
    except OSError:
        lines = []
    starts = [i for i, line in enumerate(lines) if line.startswith("equipoise: ")]
    said = lines[starts[-1] :] if starts else []
    if said and (code > 1 or all(line.startswith("  ") for line in said[1:])):  # 1 may be a traceback that came later
        return "\n".join(said)
    return lines[-1] if lines else f"exit code {code} without a word"


def _send(job: Job, number: signal.Signals) -> None:
    assert job.process is not None
    if job.process.poll() is None:
        job.process.send_signal(number)
