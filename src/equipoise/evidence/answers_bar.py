"""Progress display of runs that answer questions: a bar with speed and time left, or plain lines."""

from __future__ import annotations

from ..lab.comparison.progress import Bar
from ..lab.comparison.record_tail import duration

__all__ = ["AnswersBar"]


class AnswersBar(Bar):
    """A bar to call with (run, questions answered, questions in all), first with those that were answered before."""

    _first = ("", 0.0, 0)  # the run, and time and answers at its first call

    def __call__(self, run: str, done: int, total: int) -> None:
        now = self.clock()
        text = f"{run}: {done}/{total} questions"
        if self._first[0] != run:
            self._first = (run, now, done)
        elif done > self._first[2] and now > self._first[1]:
            speed = (done - self._first[2]) / (now - self._first[1])
            text += f"  {speed:,.0f}/s  {duration((total - done) / speed)} left"
        self.show(done, total, text)
