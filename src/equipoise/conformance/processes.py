"""Runs an adapter's steps in processes of their own, over gloo: one that dies or waits for ever ends nobody else."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import multiprocessing
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .task import Adapter, Answer, Task

__all__ = ["load_adapter", "run_tasks"]

Outcome = list[Answer] | str  # of all ranks, or what went wrong
START = 120.0  # seconds that processes get to import torch and to find each other


def load_adapter(spec: str) -> type[Adapter]:
    """The class that ``file.py:Name`` or ``package.module:Name`` names. Raises ConfigError where it is none."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise ConfigError(expected="file.py:Adapter, or package.module:Adapter", got=spec, do="name the class as well")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except ConfigError:
        raise
    except ImportError as error:
        raise ConfigError(expected=f"an importable {where}", got=str(error), do="install what it needs") from error
    except Exception as error:
        raise ConfigError(
            expected=f"{where} to run when it is imported",
            got=f"{type(error).__name__}: {error}",
            do=f"try it alone: python {where}",
        ) from error
    found = getattr(module, name, None)
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        offered = [one for one, value in vars(module).items()
                   if isinstance(value, type) and issubclass(value, Adapter) and value is not Adapter]  # fmt: skip
        raise ConfigError(
            expected=f"a subclass of equipoise.conformance.Adapter named {name} in {where}",
            got=f"{found!r}; there: {', '.join(offered) or 'none'}",
            do="derive it from Adapter" if found else "name one that is there",
        )
    return found


def run_tasks(spec: str, cuts: Sequence[Sequence[Task]], timeout: float = 60.0) -> Iterator[Outcome]:
    """What the ranks of each cut answer, in order; all cuts are of as many ranks. An error is text, not raised."""
    at = 0
    while at < len(cuts):
        with _started(spec, len(cuts[0])) as pipes:
            here, alive = _collect(pipes, START)  # each says that it is there
            if isinstance(here, str):
                yield from [f"{len(pipes)} processes did not start: {here}"] * (len(cuts) - at)
                return
            while alive and at < len(cuts):
                for pipe, task in zip(pipes, cuts[at], strict=True):
                    pipe.send(task)
                outcome, alive = _collect(pipes, timeout)
                yield outcome
                at += 1


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(expected=f"an adapter in {path}", got="no such file", do="name a Python file that is there")
    name = f"equipoise_adapter_{abs(hash(str(path.resolve())))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def _started(spec: str, ranks: int) -> Iterator[list[Connection]]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of this process's threads
    with tempfile.TemporaryDirectory(prefix="conformance-") as folder:
        processes, pipes = [], []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, spec, rank, ranks, f"{folder}/store"), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        try:
            yield pipes
        finally:
            for pipe in pipes:
                pipe.close()
            until = time.monotonic() + 2
            for process in processes:
                process.join(max(0.0, until - time.monotonic()))
                process.kill()
                process.join()


def _collect(pipes: Sequence[Connection], timeout: float) -> tuple[Outcome, bool]:
    """(the answers or an error, whether the processes can go on)."""
    until, waiting = time.monotonic() + timeout, dict(enumerate(pipes))
    answers: dict[int, Any] = {}
    while waiting:
        ready = wait(list(waiting.values()), max(0.0, until - time.monotonic()))
        if not ready:
            return f"no answer in {timeout:.0f} s: it hangs, or the machine is busy", False
        for rank, pipe in [(rank, pipe) for rank, pipe in waiting.items() if pipe in ready]:
            try:
                answer = pipe.recv()
            except (EOFError, OSError):
                return "the process died", False
            if isinstance(answer, str):
                return answer, len(pipes) == 1  # the other ranks may wait for this one
            answers[rank] = answer
            del waiting[rank]
    return [answers[rank] for rank in range(len(pipes))], True


def _serve(pipe: Connection, spec: str, rank: int, ranks: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks,
                            timeout=timedelta(seconds=600))  # fmt: skip

    def mean(tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= ranks

    load = functools.cache(load_adapter)
    with contextlib.suppress(EOFError, OSError):
        pipe.send(None)
        while True:
            task: Task = pipe.recv()
            pipe.send(_answer(lambda: load(spec), replace(task, mean=mean)))


def _answer(load: Callable[[], type[Adapter]], task: Task) -> Answer | str:
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            answer = load()().step(task)
        except Exception as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            text = " ".join(str(error).split())[:200]
            return f"{type(error).__name__}: {text} ({Path(last.filename).name}:{last.lineno})"
    return Answer(*(None if part is None else part.detach().double().cpu().clone() for part in answer))  # type: ignore[arg-type]
