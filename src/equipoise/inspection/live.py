"""Progress display of an inspection: a bar with tokens, speed and time left, or plain lines."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from ..lab.comparison.progress import Bar
from ..lab.comparison.record_tail import duration

__all__ = ["RoundsBar"]


class RoundsBar(Bar):
    """A bar to call after every round with (rounds done, rounds, tokens done)."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("loading the model", None, console, clock)
        self._first: tuple[float, int, int] | None = None  # time, rounds and tokens at the first call of this process

    def __call__(self, done: int, rounds: int, tokens: int) -> None:
        now = self.clock()
        text = f"{done}/{rounds}  {tokens:,} tokens"
        if self._first is None:
            self._first = (now, done, tokens)
        elif now > self._first[0]:
            took = now - self._first[0]
            left = took / (done - self._first[1]) * (rounds - done)
            text += f"  {(tokens - self._first[2]) / took:,.0f} tokens/s  {duration(left)} left"
        self.show(done, rounds, text)
