"""Tails a run's record while the run writes it: its step, its speed, the time it has left."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["MAXVIO", "RecordTail", "duration"]

MAXVIO = "balance/maxvio_global"
WINDOW = 20  # steps that the shown speed is measured over


class RecordTail:
    """Tails one record file; ``read`` takes what was added since the last call, and never raises.

    ``step``, ``loss`` and ``maxvio`` are those of the last step written. A file that was replaced (a resumed run drops
    the steps after its checkpoint) is read again from its start.
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._clock = path, clock
        self._first: tuple[float, int] | None = None
        self._begin(0)

    def _begin(self, inode: int) -> None:
        self.step, self.loss, self.maxvio = 0, None, None
        self._inode, self._offset = inode, 0
        self._recent: deque[tuple[int, float]] = deque(maxlen=WINDOW)

    def read(self) -> int:
        """Returns how many steps were new. A half-written last line waits for its end."""
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._begin(status.st_ino)
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return 0
        complete, newline, _ = text.rpartition(b"\n")
        self._offset += len(complete) + len(newline)
        new = sum(self._take(line) for line in complete.split(b"\n") if b'"step"' in line)
        if new and self._first is None:
            self._first = (self._clock(), self.step)  # what was there before counts as done, not as fast
        return new

    def _take(self, line: bytes) -> bool:
        try:
            data: dict[str, Any] = json.loads(line)
            if data["kind"] != "step":
                return False
            step, tokens, seconds = int(data["step"]), int(data["tokens"]), float(data["seconds"])
        except (ValueError, KeyError, TypeError):
            return False
        self.step, self.loss = step, data.get("loss")
        self.maxvio = data.get("balance", {}).get(MAXVIO, self.maxvio)
        self._recent.append((tokens, seconds))
        return True

    @property
    def tokens_per_second(self) -> float | None:
        """Of the last 20 steps, without evaluation."""
        seconds = sum(seconds for _, seconds in self._recent)
        return sum(tokens for tokens, _ in self._recent) / seconds if seconds > 0 else None

    def seconds_left(self, steps: int) -> float | None:
        """Until step ``steps``, at the pace on the wall clock: evaluation and checkpoints are in it."""
        if self._first is None or self.step <= self._first[1]:
            return None
        return (self._clock() - self._first[0]) / (self.step - self._first[1]) * max(steps - self.step, 0)


def duration(seconds: float | None) -> str:
    """A time as a person writes it.

    >>> duration(75), duration(3700), duration(None)
    ('1:15', '1:01:40', '')
    """
    if seconds is None:
        return ""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
