"""From what the user names (a run, a comparison, a record file) to the runs that are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import DataError
from ..records import RECORD_NAME, Run, read_run

__all__ = ["load_runs"]


def load_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """Runs in the order named (inside a comparison in the order they were asked for), and what could not be read.

    A broken run inside a comparison's folder costs that run only; one that was named itself is a DataError.
    """
    runs: list[Run] = []
    problems: list[str] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        folders = [path] if not path.is_dir() or (path / RECORD_NAME).exists() else _inside(path)
        if not folders:
            raise DataError(expected=f"a run in {path}", got=f"a folder without any {RECORD_NAME}",
                            do="pass the folder of a run, or of a comparison that holds runs")  # fmt: skip
        found, errors = [], []
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                found.append(read_run(folder))
            except DataError as error:
                if len(folders) == 1:
                    raise
                errors.append(f"{folder.name}: left out, {error.got}")
        if errors and not found:
            raise DataError(expected=f"a readable run in {path}", got="; ".join(errors[:3]), do="train them again")
        runs += found if folders == [path] else _in_order(path, found)
        problems += errors
    return runs, problems


def _inside(folder: Path) -> list[Path]:
    """Runs one or two levels down: comparison/strategy or comparison/strategy/seed."""
    return sorted({file.parent for pattern in ("*", "*/*") for file in folder.glob(f"{pattern}/{RECORD_NAME}")})


def _in_order(folder: Path, runs: list[Run]) -> list[Run]:
    """The order of ``strategies`` in comparison.json, where there is one; else that in which they were started."""
    order: dict[object, int] = {}
    try:
        data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        names = data.get("strategies") or data["config"]["strategies"]
        order = {name if isinstance(name, str) else name["name"]: index for index, name in enumerate(names)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # only the order depends on it
    last = len(order)
    return sorted(runs, key=lambda run: (order.get(run.header.strategy, last), run.header.started, run.header.seed))
