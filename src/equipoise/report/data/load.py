"""Reads what a path names: a run, a comparison, an inspection, or the file of one of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ...errors import DataError
from ...storage.inspection_record import INSPECTION_NAME, Inspection, is_inspection, read_inspection
from ...storage.run_record import RECORD_NAME, Run, read_run

__all__ = ["load", "load_runs"]


def load(paths: Sequence[str | Path]) -> tuple[list[Run], list[Inspection], list[str]]:
    """Reads runs and inspections in the order of ``paths``, runs of a comparison in the order of its strategies.

    Returns runs, inspections, and a sentence for each that could not be read and was left out. Raises DataError if
    nothing could be read.
    """
    runs: list[Run] = []
    inspections: list[Inspection] = []
    problems: list[str] = []
    errors: list[DataError] = []
    seen: set[Path] = set()
    for path in map(Path, paths):
        whole = path.parent if path.name == INSPECTION_NAME else path
        folders = [whole] if _is_one(whole) else _inside(whole)
        if not folders:
            error = DataError(
                expected=f"a run or an inspection in {path}",
                got=f"a folder without any {RECORD_NAME} or {INSPECTION_NAME}",
                do="pass the folder of a run, of an inspection, or of a comparison that holds runs",
            )
            errors.append(error)
            problems.append(f"{path.name}: left out, {error.got}")
        found: list[Run] = []
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            try:
                if is_inspection(folder) or (folder / "state").is_dir():
                    inspections.append(read_inspection(folder))
                if not folder.is_dir() or (folder / RECORD_NAME).exists():
                    found.append(read_run(folder))
            except DataError as error:
                errors.append(error)
                problems.append(f"{folder.name}: left out, {error.got}")
        runs += found if folders == [whole] else _in_order(path, found)
    if not runs and not inspections:
        if len(errors) == 1:
            raise errors[0]
        remedies = {error.do for error in errors}
        raise DataError(expected="something readable in what was named", got="; ".join(problems[:3]) or "nothing",
                        do=remedies.pop() if len(remedies) == 1 else "train or inspect again")  # fmt: skip
    return runs, inspections, problems


def load_runs(paths: Sequence[str | Path]) -> tuple[list[Run], list[str]]:
    """`load` for runs only. Raises DataError if there are none."""
    runs, _, problems = load(paths)
    if not runs:
        raise DataError(expected=f"a run in {', '.join(map(str, paths))}", got="inspections only",
                        do="pass the folder of a run")  # fmt: skip
    return runs, problems


def _is_one(path: Path) -> bool:
    return not path.is_dir() or (path / RECORD_NAME).exists() or is_inspection(path) or (path / "state").is_dir()


def _inside(folder: Path) -> list[Path]:
    """Folders of runs and inspections one or two levels down: comparison/strategy or comparison/strategy/seed."""
    names = (RECORD_NAME, INSPECTION_NAME)
    return sorted(
        {file.parent for pattern in ("*", "*/*") for name in names for file in folder.glob(f"{pattern}/{name}")}
    )


def _in_order(folder: Path, runs: list[Run]) -> list[Run]:
    """Sorts runs by ``strategies`` in comparison.json if there is one, else by start time."""
    order: dict[object, int] = {}
    try:
        data = json.loads((folder / "comparison.json").read_text(encoding="utf-8"))
        names = data.get("strategies") or data["config"]["strategies"]
        order = {name if isinstance(name, str) else name["name"]: index for index, name in enumerate(names)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # only the order depends on this file
    last = len(order)
    return sorted(runs, key=lambda run: (order.get(run.header.strategy, last), run.header.started, run.header.seed))
