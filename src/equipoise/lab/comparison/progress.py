"""Progress display: a live table for a comparison, a bar for a run, plain lines without a terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from ...storage.run_record import Step
from .record_tail import MAXVIO, duration

if TYPE_CHECKING:
    from .workers import Job

__all__ = ["Bar", "Preparation", "RunBar", "RunTable", "open_console"]

PLAIN_EVERY = 30.0  # seconds between the lines of a run where there is no terminal
COLORS = {"failed": "red", "finished": "green", "interrupted": "yellow", "waiting": "dim"}


def open_console() -> Console:
    """Where progress goes: stderr, so that stdout holds results only. Without a terminal rich draws nothing."""
    return Console(stderr=True, highlight=False)


class RunTable:
    """All runs of a comparison: step, loss, MaxVio, tokens/s and time left of each; a context manager."""

    def __init__(self, jobs: list[Job], console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.jobs, self.console, self._clock = jobs, console, clock
        self._began = clock()
        self._said = dict.fromkeys((job.name for job in jobs), -math.inf)
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> RunTable:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.update(self.table(self.jobs))
            self._live.stop()

    def update(self, changed: list[Job]) -> None:
        """Draws the table again; without a terminal, a line for what changed and now and then one for each run."""
        if self._live:
            self._live.update(self.table(self._in_sight()), refresh=True)
        now = self._clock()
        for job in self.jobs:
            if job in changed and job.status == "failed":
                self.console.print(f"{job.name}: failed\n{job.error}", markup=False, style="red")
            elif self._live is None and (
                job in changed or (job.status == "running" and now - self._said[job.name] > PLAIN_EVERY)
            ):
                self._said[job.name] = now
                self.console.print(self.line(job), markup=False, soft_wrap=True)

    def line(self, job: Job) -> str:
        """One run in one line of plain text."""
        if job.status == "waiting" and job.error:
            return f"{job.name}: waiting again, {job.error}"
        status = job.status + (f" on {job.node}" if job.node else "")
        if job.status == "running" and job.tail.step == 0:
            return f"{job.name}: {status}, no step yet"
        seen = [status, f"step {job.tail.step}/{job.steps}"]
        loss, vio, speed, left = _numbers(job)
        seen += [f"loss {loss}"] * bool(loss) + [f"MaxVio {vio}"] * bool(vio) + [f"{speed} tokens/s"] * bool(speed)
        seen += [f"{left} left"] * bool(left)
        return f"{job.name}: " + ", ".join(seen)

    def _in_sight(self) -> list[Job]:
        """As many as the terminal has lines for: of those that wait and have finished, the nearest to what runs."""
        too_many = len(self.jobs) - max(self.console.height - 4, 3)
        waiting = [job.name for job in self.jobs if job.status == "waiting"]
        finished = [job.name for job in self.jobs if job.status == "finished"]
        gone = waiting[::-1][: max(too_many, 0)]
        gone += finished[: max(too_many - len(gone), 0)]
        return [job for job in self.jobs if job.name not in gone]

    def table(self, jobs: list[Job]) -> Table:
        done = sum(job.status in ("finished", "failed") for job in self.jobs)
        caption = f"{done} of {len(self.jobs)} runs, {duration(self._clock() - self._began)}"
        left = self.seconds_left()
        table = Table(caption=caption + (f", about {duration(left)} left" if left else ""), box=None, pad_edge=False)
        nodes = any(job.node for job in self.jobs)
        for name in ("run", *["node"] * nodes, "step", "loss", "MaxVio", "tokens/s", "left"):
            table.add_column(name, justify="left" if name == "run" else "right", no_wrap=True)
        for job in jobs:
            loss, vio, speed, left = _numbers(job)
            step = f"{job.tail.step}/{job.steps}" if job.status != "waiting" else ""
            state = left if job.status == "running" else job.status
            where = [Text(job.node)] * nodes
            table.add_row(Text(job.name), *where, step, loss, vio, speed, state, style=COLORS.get(job.status))
        return table

    def seconds_left(self) -> float | None:
        """Of the whole comparison: the steps left at the pace of those that run now, so many at a time."""
        running = [job for job in self.jobs if job.status == "running"]
        each = [(job, job.tail.seconds_left(job.steps)) for job in running]
        if not running or any(left is None for _, left in each):
            return None
        paces = [left / (job.steps - job.tail.step) for job, left in each if left and job.steps > job.tail.step]
        if not paces:
            return None
        waiting = sum(job.steps for job in self.jobs if job.status == "waiting")
        remaining = waiting + sum(job.steps - job.tail.step for job in running)
        longest = max(left for _, left in each if left is not None)
        return max(longest, remaining * sum(paces) / len(paces) / len(running))


class Bar:
    """A bar with a text on a terminal, from the first text on; elsewhere a line now and then. A context manager."""

    def __init__(self, text: str, total: int | None, console: Console, clock: Callable[[], float]) -> None:
        self.console, self.clock = console, clock
        self._said = -math.inf
        columns = (SpinnerColumn(), BarColumn(bar_width=24), TextColumn("{task.description}"))
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task(text, total=total) if self._bar else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def show(self, done: int, total: int, text: str, unit: str = "") -> None:
        now = self.clock()
        if self._bar is not None and self._task is not None:
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif now - self._said > PLAIN_EVERY or done == total:
            self._said = now
            self.console.print(f"{unit}{text}", markup=False, soft_wrap=True)


class RunBar(Bar):
    """The bar of one run: step, loss, MaxVio, tokens/s, time left; call it with every Step."""

    def __init__(self, steps: int, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__("starting", steps, console, clock)
        self.steps = steps
        self._first: tuple[float, int] | None = None
        if self._bar:
            self._bar.start()

    def __call__(self, step: Step) -> None:
        now = self.clock()
        if self._first is None:
            self._first = (now, step.step)
        took = step.step - self._first[1]
        left = (now - self._first[0]) / took * (self.steps - step.step) if took else None
        text = f"{step.step}/{self.steps}  loss {step.loss:.3f}"
        if MAXVIO in step.balance:
            text += f"  MaxVio {step.balance[MAXVIO]:.2f}"
        text += f"  {step.tokens / step.seconds:,.0f} tokens/s" if step.seconds > 0 else ""
        text += f"  {duration(left)} left" if left is not None else ""
        self.show(step.step, self.steps, text, unit="step ")


class Preparation:
    """Shows what is being read or built before the first step; call it with a text and the share that is done."""

    def __init__(self, console: Console) -> None:
        self.console, self._said = console, ""
        self._status = console.status("reading text") if console.is_terminal else None

    def __enter__(self) -> Preparation:
        if self._status:
            self._status.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._status:
            self._status.stop()

    def __call__(self, text: str, share: float) -> None:
        if self._status:
            self._status.update(f"{text} {share:.0%}")
        elif text != self._said:
            self._said = text
            self.console.print(text, markup=False, soft_wrap=True)


def _numbers(job: Job) -> tuple[str, str, str, str]:
    """Loss, MaxVio, tokens/s and time left as text; empty where nothing is known yet."""
    seen = job.tail
    running = job.status == "running"
    loss = f"{seen.loss:.3f}" if seen.loss is not None else ""
    vio = f"{seen.maxvio:.2f}" if seen.maxvio is not None else ""
    speed = f"{seen.tokens_per_second:,.0f}" if seen.tokens_per_second else ""
    return loss, vio, speed, duration(seen.seconds_left(job.steps)) if running else ""
