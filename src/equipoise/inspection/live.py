"""What is seen while a text passes through a model: a bar with tokens, speed and time left; plain lines without one."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

from ..lab.follow import duration

__all__ = ["RoundsBar"]

PLAIN_EVERY = 30.0  # seconds between lines where there is no terminal


class RoundsBar:
    """Call it after every round with (rounds done, rounds, tokens done). A context manager."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self._clock = console, clock
        self._first: tuple[float, int, int] | None = None  # time, rounds, tokens: the speed is of this process
        self._said = -math.inf
        columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("loading the model", total=None) if self._bar else None

    def __enter__(self) -> RoundsBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, done: int, rounds: int, tokens: int) -> None:
        now = self._clock()
        text = f"{done}/{rounds}  {tokens:,} tokens"
        if self._first is None:
            self._first = (now, done, tokens)
        elif now > self._first[0]:
            took = now - self._first[0]
            left = took / (done - self._first[1]) * (rounds - done)
            text += f"  {(tokens - self._first[2]) / took:,.0f} tokens/s  {duration(left)} left"
        if self._bar is not None and self._task is not None:
            self._bar.start()
            self._bar.update(self._task, completed=done, total=rounds, description=text)
        elif now - self._said > PLAIN_EVERY or done == rounds:
            self._said = now
            self.console.print(text, markup=False, soft_wrap=True)
