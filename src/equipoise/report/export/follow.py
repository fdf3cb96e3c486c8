"""Rewrites a page while the runs behind it go on: which files it is made of, whether they still grow, and the loop."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ...errors import DataError
from ...storage.inspection_record import INSPECTION_NAME, is_inspection
from ...storage.run_record import RECORD_NAME, Run
from ..html.page import write_file
from .outputs import Report, read_report

__all__ = ["follow", "is_running", "signature"]

LOOK = 0.5  # seconds between two looks at the files
FILES = (RECORD_NAME, INSPECTION_NAME, "comparison.json")


def follow(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    baseline: str | None = None,
    every: float = 10.0,
    say: Callable[[str], None] = print,
) -> tuple[Report, Path]:
    """Writes the page whenever a file behind it has changed, until nothing of it is running any more.

    The last page, also the one after Ctrl-C, does not refresh itself.

    Args:
        paths, baseline: see `read_report`. Paths that hold nothing yet are waited for.
        out: the page; None for report.html in or beside the first of ``paths``.
        every: seconds between two pages at least.
        say: is called with a line of progress whenever it changes.

    Returns the last report and the path of the page. Raises OutputError where the page cannot be written.
    """
    page = Path(out) if out else _beside(Path(paths[0]))
    before, report, said = None, None, ""
    try:
        while True:
            now = signature(paths)
            if now == before:
                time.sleep(min(LOOK, every))
                continue
            before = now
            try:
                report = read_report(paths, baseline)
            except DataError as error:  # the record of a run that starts just now has no header yet
                report, text = None, f"waiting: expected {error.expected}, got {error.got}"
            else:
                running = is_running(paths, report.runs)
                write_file(page, report.html(live=every if running else 0))
                if not running:
                    return report, page
                text = f"{page}: {_progress(report.runs)}"
            if text != said:
                say(text)
                said = text
            time.sleep(every)
    except KeyboardInterrupt:
        if report is not None:
            write_file(page, report.html())
        raise


def _beside(path: Path) -> Path:
    return (path if path.is_dir() else path.parent) / "report.html"


def _progress(runs: Sequence[Run]) -> str:
    states: dict[str, int] = {}
    for one in runs:
        states[one.status] = states.get(one.status, 0) + 1
    last = max((one.steps[-1].step for one in runs if one.steps), default=0)
    return ", ".join(f"{count} {status}" for status, count in states.items()) + f", step {last}"


def signature(paths: Sequence[str | Path]) -> tuple[tuple[str, int, int, int], ...]:
    """Name, inode, size and time of the files that a report reads: changes when one is written, replaced or removed."""
    found = []
    for path in map(Path, paths):
        files = (
            [path]
            if path.is_file()
            else [f for name in FILES for depth in ("", "*/", "*/*/") for f in path.glob(depth + name)]
        )
        for file in sorted(files):
            try:
                status = os.stat(file)
            except OSError:  # replaced or removed between the two looks
                continue
            found.append((str(file), status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def is_running(paths: Sequence[str | Path], runs: Sequence[Run]) -> bool:
    """Whether a run or an inspection has not ended, or a comparison still has runs to start."""
    return any(run.status == "running" for run in runs) or any(
        _has_more(path) or _is_inspecting(path) for path in map(Path, paths)
    )


def _is_inspecting(path: Path) -> bool:
    """Whether an unfinished inspection is in ``path``, at most two folders down: its state without its results."""
    folders = [place.parent for depth in ("", "*/", "*/*/") for place in path.glob(depth + "state")]
    return any(not is_inspection(folder) for folder in folders)


def _has_more(folder: Path) -> bool:
    try:
        return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["status"] in ("running", "waiting")
    except (OSError, ValueError, KeyError, TypeError):
        return False
