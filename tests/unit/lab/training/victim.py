"""Processes that something happens to: killed, stopped, starved of disk in the middle of their work."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError


def train(config: Any, folder: Path, *, act: str, at: int) -> tuple[int, str]:
    """A run that meets ``act`` after step ``at``: a signal's name, or "limit": no file may grow above 20 kB.

    Returns its exit code, and its error.
    """
    return _in_process(_train, config, folder, act, at)


def save(folder: Path, step: int, state: dict[str, Any], *, limit: int) -> tuple[int, str]:
    """Saves a checkpoint where no file may grow above ``limit`` bytes, as on a full disk."""
    return _in_process(_save, folder, step, state, limit)


def save_until_killed(folder: Path, state: dict[str, Any], *, seconds: float) -> int:
    """Saves step after step until a kill. Returns the exit code."""
    return _in_process(_save_for_ever, folder, state, after=seconds)[0]


def _in_process(work: Any, *arguments: Any, after: float | None = None) -> tuple[int, str]:
    # A server that has imported torch once and forks: much faster than a new interpreter for each, and unlike a fork of
    # the test process it has no threads.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["equipoise.lab.training.trainer", "safetensors.torch", "torch._dynamo"])
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_guard, args=(work, arguments, send))
    process.start()
    send.close()
    with receive:
        if after is not None:
            receive.recv()  # it has begun
            time.sleep(after)
            os.kill(process.pid or 0, signal.SIGKILL)
        process.join(timeout=120)
        assert process.exitcode is not None, "the process hangs"
        try:
            return process.exitcode, receive.recv()
        except EOFError:  # it said nothing
            return process.exitcode, ""


def _guard(work: Any, arguments: tuple[Any, ...], send: Any) -> None:
    try:
        work(*arguments, send)
    except KeyboardInterrupt:
        sys.exit(130)
    except EquipoiseError as error:
        send.send(str(error))
        sys.exit(error.exit_code)


def _train(config: Any, folder: Path, act: str, at: int, send: Any) -> None:
    from equipoise.lab.training.trainer import train

    def on_step(step: Any) -> None:
        if step.step != at:
            return
        if act == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        else:
            os.kill(os.getpid(), getattr(signal, act))

    train(config, folder, on_step=on_step)


def _save(folder: Path, step: int, state: dict[str, Any], limit: int, send: Any) -> None:
    from equipoise.storage import checkpoint

    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    checkpoint.save(folder, step, state)


def _save_for_ever(folder: Path, state: dict[str, Any], send: Any) -> None:
    from equipoise.storage import checkpoint

    step = 1
    while True:
        checkpoint.save(folder, step, state | {"step": step})
        if step == 1:
            send.send("begun")
        step += 1
