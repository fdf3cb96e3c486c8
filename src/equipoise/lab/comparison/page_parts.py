"""Parts of the pages on small runs: colours, a map of who computes what, differences, where it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from ...report.data.formatting import duration, signed
from ...report.data.run_view import flatten
from ...report.data.statistics import Difference
from ...report.html.pictures import Picture, Text
from ...report.html.rendering import minus
from ...report.html.widgets import Cell, Part, table
from ...storage.run_record import Run

__all__ = ["COLOURS", "STYLES", "Named", "difference_cell", "expert_map", "keys", "origin"]

COLOURS = 8  # of base.css
STYLES = ("base", "tables", "pictures", "print", "small_runs")
SHADES = 9  # of a cell, from no token to twice the even share and more; the middle one is even
CELL, LEFT = 30, 92  # of a map of experts, in half pixels


class Named(Protocol):
    """A strategy and its runs."""

    @property
    def name(self) -> str: ...

    @property
    def runs(self) -> list[Run]: ...


def keys(strategies: Sequence[Named]) -> Part:
    """The names in their colours."""
    return "keys", {"names": [(one.name, at % COLOURS) for at, one in enumerate(strategies)]}


def expert_map(cells_DE: Sequence[Sequence[float]], names: Sequence[str], order: Sequence[int], said: str) -> Picture:
    """A row for each of ``names``, a column for each expert in ``order``; a cell is a share over the even one."""
    shades: dict[int, str] = {}
    for row, values in enumerate(cells_DE):
        for column, expert in enumerate(order):
            shade = min(SHADES - 1, round(values[expert] * (SHADES - 1) / 2))
            corner = f"M{LEFT + CELL * column} {CELL * row}h{CELL - 2}v{CELL - 2}h{2 - CELL}z"
            shades[shade] = shades.get(shade, "") + corner
    bottom = CELL * len(names)
    texts: list[Text] = [("end", LEFT - 10, CELL * row + 22, name) for row, name in enumerate(names)]
    texts += [("", LEFT + CELL * column + 14, bottom + 24, str(expert)) for column, expert in enumerate(order)]
    paths = [(f"shade{shade}", data) for shade, data in sorted(shades.items())]
    return Picture("chart map", LEFT + CELL * len(order), bottom + 32, paths, texts, label=said)


def difference_cell(difference: Difference | None) -> Cell:
    """Below 0 is better."""
    if difference is None:
        return Cell("–")
    tone = ("good" if difference.mean < 0 else "bad") if difference.is_clear else ""
    small = [] if difference.low is None else [
        (tone, minus(f"[{signed(difference.low, 4)}, {signed(difference.high, 4)}]"))
    ]  # fmt: skip
    return Cell(minus(signed(difference.mean, 4)), difference.mean, small, difference.is_clear and difference.mean < 0)


def origin(strategies: Sequence[Named]) -> list[Part]:
    """The runs, their configuration, data and versions."""
    runs = [run for one in strategies for run in one.runs]
    rows = [
        [Cell(run.header.strategy), Cell(run.header.seed), Cell(run.status), Cell(run.end.step if run.end else ""),
         Cell(duration(run.end.seconds) if run.end else ""), Cell(codes=[run.path.name])]
        for run in runs
    ]  # fmt: skip
    header = runs[0].header
    settings = [
        (name, str(value)) for name, value in flatten(header.config).items() if name not in ("strategy", "train.seed")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in header.versions.items())
    return [
        table("runs", "runs", ["Strategy", "Seed", "Status", "Steps", "Time", "Folder"], rows, left=(0, 2, 5)),
        ("fold", {"summary": "Configuration", "inner": ("settings", {"settings": settings})}),
        ("origin", {"corpora": sorted({run.header.corpus_sha256 for run in runs}), "versions": versions}),
    ]
