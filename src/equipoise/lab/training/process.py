"""Process-wide settings of a run: threads, memory, and signals that stop it between two steps."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch

from ...torch_internals import multiplies_bf16

__all__ = [
    "fast_precision",
    "is_due",
    "keep_freed_memory",
    "peak_memory",
    "run_to_end",
    "stop_signals",
    "threads",
]


def fast_precision() -> str:
    """``bf16`` where the machine multiplies it, else ``fp32``.

    A processor without such instructions (AVX-512 on x86) takes 40 times longer for a product in bf16 than in fp32.
    """
    return "bf16" if torch.cuda.is_available() or multiplies_bf16() else "fp32"


def keep_freed_memory() -> None:
    """Lets glibc keep what tensors free, instead of handing it back to the system and asking again a moment later.

    That would be 40,000 page faults a step of 8192 tokens of width 128, and 15 % of its time. Without glibc it does
    nothing.
    """
    trim_threshold, mmap_threshold = -1, -3
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL("libc.so.6")
        library.mallopt(mmap_threshold, 1 << 30)
        library.mallopt(trim_threshold, (1 << 31) - 1)


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; signals reach only a process's main thread."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Steps(Protocol):
    """A run that can be trained step by step."""

    step: int

    def train_step(self) -> Any: ...
    def after_step(self) -> None: ...
    def finish(self) -> None: ...
    def fail(self, error: BaseException) -> None: ...
    def close(self) -> None: ...


def run_to_end(
    run: Steps, steps: int, on_step: Callable[[Any], None] | None, stops: Callable[[bool], bool] = bool
) -> None:
    """All steps that are left; Ctrl-C and SIGTERM end the step at hand, save and raise KeyboardInterrupt.

    ``stops``: whether all ranks stop, where this one does or does not.
    """
    with stop_signals() as stop:
        try:
            while run.step < steps and not stops(stop.is_set()):
                record = run.train_step()
                if on_step is not None:
                    on_step(record)
                run.after_step()
            run.finish()
        except BaseException as error:
            run.fail(error)
            raise
        finally:
            run.close()
    if run.step < steps:
        raise KeyboardInterrupt


def is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def peak_memory() -> int:
    """Peak resident memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
