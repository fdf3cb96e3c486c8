"""Four real processes that talk over gloo, started once per test session: what every test with several ranks runs on.

A test takes the fixture ``ranks`` (see ``conftest.py``) and calls ``ranks.run("package.module:name", 1, size=2)``: the
function runs in each of ``size`` processes, inside a process group of its own, and what it returns comes back as a list
in rank order. Arguments and results are pickled, so they are plain values or CPU tensors.

An exception in a rank is raised in the test with that rank's traceback; a rank that dies or hangs ends all of them, and
the next call starts new ones. Starting takes seconds, a case milliseconds.
"""

from __future__ import annotations

import contextlib
import datetime
import faulthandler
import gc
import importlib
import math
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

__all__ = ["GRACE", "Pool", "RankError"]

HOST = "127.0.0.1"
GRACE = 10.0  # seconds that the other ranks get once one has failed


class RankError(Exception):
    """A rank raised, died or hung. ``kind`` is the exception's name, "died", "aborted" or "hung"."""

    def __init__(self, rank: int, size: int, kind: str, report: str) -> None:
        super().__init__(f"rank {rank} of {size}: {kind}\n{report}")
        self.rank, self.kind, self.report = rank, kind, report


class Worker:
    """The parent's side of one process."""

    def __init__(self, port: int, folder: Path, name: str) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of this process
        self.stacks, self.said = folder / f"{name}.stacks", folder / f"{name}.stderr"
        self.pipe, theirs = context.Pipe()
        files = str(self.stacks), str(self.said)
        self.process = context.Process(target=_serve, args=(theirs, port, *files), name=name, daemon=True)
        self.process.start()
        theirs.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def where_it_is(self) -> str:
        """The Python stacks of a process that does not answer."""
        with contextlib.suppress(OSError):
            os.kill(self.process.pid or 0, signal.SIGUSR1)
        time.sleep(0.2)
        return self.stacks.read_text() if self.stacks.exists() else ""

    def last_words(self) -> str:
        """The end of what it wrote to stderr: C++ code that aborts says why nowhere else."""
        return self.said.read_text(errors="replace")[-4000:] if self.said.exists() else ""


class Pool:
    """Processes that wait for cases. Nothing is started before the first ``run``."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._workers: list[Worker] = []
        self._store: Any = None
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        self._started = self._cases = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._folder.cleanup()

    def pids(self) -> list[int]:
        """Of the processes that live now, rank by rank."""
        return [worker.process.pid or 0 for worker in self._workers]

    def run(self, function: str, *args: Any, size: int = 2, timeout: float = 60) -> list[Any]:
        """Calls ``function`` ("package.module:name") in ``size`` ranks at once; returns their results in rank order.

        Raises RankError for the rank that failed first, with its traceback, and those of the others behind it. An abort
        of the C++ code below Python, which no line of a case can ask for, is tried once more, with a warning that says
        what was seen: it came once in tens of thousands of cases, with a process group of an earlier case half gone.
        """
        if not 1 <= size <= self.size:
            raise ValueError(f"size {size} of a pool of {self.size}")
        try:
            return self._run(function, args, size, timeout)
        except RankError as error:
            if error.kind != "aborted":
                raise
            warnings.warn(f"a rank aborted, and {function} runs again: {error}", RuntimeWarning, stacklevel=2)
        return self._run(function, args, size, timeout)

    def _run(self, function: str, args: tuple, size: int, timeout: float) -> list[Any]:
        self._start()
        self._cases += 1
        workers = self._workers[:size]
        try:
            for rank, worker in enumerate(workers):
                worker.pipe.send_bytes(pickle.dumps((self._cases, function, args, rank, size, timeout)))
            return self._answers(workers, timeout)
        except RankError:
            raise
        except BaseException:  # Ctrl-C, a broken pipe: what the ranks do now is not known
            self.stop()
            raise

    def stop(self) -> None:
        """Ends all processes: those that wait for a case leave by themselves, the others are killed."""
        for worker in self._workers:
            worker.pipe.close()
        until = time.monotonic() + 2
        for worker in self._workers:
            worker.process.join(max(0.0, until - time.monotonic()))
            worker.kill()
        self._workers, self._store = [], None

    def _start(self) -> None:
        if self._workers and all(worker.process.is_alive() for worker in self._workers):
            return
        self.stop()
        import torch.distributed as dist

        self._started += 1
        self._store = dist.TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        folder, generation = Path(self._folder.name), self._started
        self._workers = [Worker(self._store.port, folder, f"rank-{generation}-{i}") for i in range(self.size)]

    def _answers(self, workers: list[Worker], timeout: float) -> list[Any]:
        """Waits for all; after the first failure only a little longer."""
        deadline = time.monotonic() + timeout + (60 if self._cases == 1 else 30)  # the first case imports torch
        results: dict[int, Any] = {}
        failed: list[tuple[float, int, str, str]] = []
        waiting = dict(enumerate(workers))
        while waiting:
            ready = wait([w.pipe for w in waiting.values()], max(0.0, deadline - time.monotonic()))
            for rank, worker in [(r, w) for r, w in waiting.items() if w.pipe in ready]:
                try:
                    kind, value, at = pickle.loads(worker.pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    worker.process.join()
                    kind = "aborted" if worker.process.exitcode == -signal.SIGABRT else "died"
                    value, at = _how_it_ended(worker), 0.0
                if kind == "ready":  # imports are done: the case's own time begins
                    deadline = deadline if failed else time.monotonic() + timeout
                    continue
                del waiting[rank]
                if kind == "done":
                    results[rank] = value
                else:
                    failed.append((at, rank, kind, value))
                    deadline = min(deadline, time.monotonic() + GRACE)
            if not ready:
                failed += [(math.inf, rank, "hung", worker.where_it_is()) for rank, worker in waiting.items()]
                break
        if failed:
            self._raise(failed, len(workers))
        return [results[rank] for rank in range(len(workers))]

    def _raise(self, failed: list[tuple[float, int, str, str]], size: int) -> None:
        """The first in time leads: the others mostly say that a rank is gone."""
        (_, rank, kind, report), *later = sorted(failed)
        others = "".join(f"\n--- then rank {r}: {k}\n{text}" for _, r, k, text in later)
        if any(k in ("died", "aborted", "hung") for _, _, k, _ in failed):
            self.stop()
        raise RankError(rank, size, kind, report + others)


def _how_it_ended(worker: Worker) -> str:
    return f"exit code {worker.process.exitcode} (-9: killed, -6: aborted)\n{worker.last_words()}"


def _serve(pipe: Connection, port: int, stacks: str, said: str) -> None:
    """The process's side: waits for cases until its parent is gone."""
    with open(said, "wb", 0) as file:
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of the terminal; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with open(stacks, "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file)
        faulthandler.enable()  # an abort inside a collective says which Python line called it
        if sys.platform == "linux":
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the host's name need not resolve
        import torch
        import torch.distributed as dist

        torch.set_num_threads(1)
        store = dist.TCPStore(HOST, port, is_master=False)
        imported = 0
        while True:
            try:
                case = pickle.loads(pipe.recv_bytes())
            except EOFError:
                return
            answer = _answer(pipe, store, *case)
            imported = _collect(imported)
            pipe.send_bytes(pickle.dumps(answer))


def _collect(imported: int) -> int:
    """Ends the process group of a case, which reference cycles keep, now and in all ranks: its threads and sockets
    would else go whenever Python collects, in the middle of another case's sums. Returns how many modules are loaded.
    """
    gc.collect()
    if len(sys.modules) > imported:  # what imports made stays: the next collection need not look at it
        gc.freeze()
    return len(sys.modules)


def _end_with_parent() -> None:
    """A rank may wait inside a collective for ever: not longer than its parent lives."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _answer(pipe: Connection, store: Any, case: int, function: str, args: tuple, rank: int, size: int, timeout: float):
    """("done", result, time) or (name of the exception, traceback, time)."""
    import torch
    import torch.distributed as dist

    module, _, name = function.partition(":")
    try:
        call = getattr(importlib.import_module(module), name)
        torch.manual_seed(0)
        limit = datetime.timedelta(seconds=timeout + GRACE)
        dist.init_process_group(
            "gloo", store=dist.PrefixStore(f"case-{case}", store), rank=rank, world_size=size, timeout=limit
        )
        pipe.send_bytes(pickle.dumps(("ready", None, 0.0)))
        return "done", _plain(call(*args)), time.monotonic()
    except BaseException as error:
        return type(error).__name__, traceback.format_exc(), time.monotonic()
    finally:
        if dist.is_initialized():  # its sockets close, so that nobody waits for a rank that failed
            with contextlib.suppress(Exception):
                dist.destroy_process_group()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()


def _plain(value: Any) -> Any:
    pickle.dumps(value)  # what cannot be sent fails here, with a traceback
    return value
