"""Whether what a report shows still changes: which files stand behind it, and whether something of it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from ...storage.inspection_record import INSPECTION_NAME, is_inspection
from ...storage.run_record import RECORD_NAME, Run

__all__ = ["goes_on", "signature"]

FILES = (RECORD_NAME, INSPECTION_NAME, "comparison.json")


def signature(paths: Sequence[str | Path]) -> tuple[tuple[str, int, int, int], ...]:
    """Changes when one of the files that a report reads was written, replaced, or came or went."""
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


def goes_on(paths: Sequence[str | Path], runs: Sequence[Run]) -> bool:
    """Whether a run or an inspection among them has not ended, or a comparison still has runs to start."""
    return any(run.end is None for run in runs) or any(_has_more(path) or _inspects(path) for path in map(Path, paths))


def _inspects(path: Path) -> bool:
    """Whether sums of an inspection lie there, at most two folders down, whose numbers are still to come."""
    folders = [place.parent for depth in ("", "*/", "*/*/") for place in path.glob(depth + "state")]
    return any(not is_inspection(folder) for folder in folders)


def _has_more(folder: Path) -> bool:
    try:
        return json.loads((folder / "comparison.json").read_text(encoding="utf-8"))["status"] in ("running", "waiting")
    except (OSError, ValueError, KeyError, TypeError):
        return False
