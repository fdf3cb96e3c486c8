"""Writes the numbers of a report as CSV: one file, or a folder with everything that was recorded."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...storage.run_record import Run
from ..data.comparison import Comparison
from ..data.comparison_columns import COMPARISON_COLUMNS
from ..data.inspections import LAYER_COLUMNS, NamedInspection
from ..html.page import write_file

__all__ = ["write_csv"]

Rows = Iterator[Sequence[Any]]


def write_csv(
    path: str | Path, comparison: Comparison | None, runs: Sequence[Run], found: Sequence[NamedInspection]
) -> list[Path]:
    """Writes the table of all numbers if ``path`` ends in .csv, else a folder with a file for each kind of record.

    Metrics have the names that they have in the record and in TensorBoard. Returns the paths written. Raises
    OutputError if one cannot be written, and ConfigError if ``path`` ends in .csv and is a folder.
    """
    path = Path(path)
    sheets: dict[str, Rows] = {}
    if comparison is not None:
        sheets |= {
            "numbers": _numbers(comparison),
            "steps": _steps(runs),
            "evaluations": _evaluations(runs),
            "loads": _loads(runs),
        }
    if found:
        sheets |= {"inspected_layers": _layers(found), "inspected_domains": _domains(found)}
    if path.suffix.lower() != ".csv":
        return [write_file(path / f"{name}.csv", _text(rows)) for name, rows in sheets.items()]
    if path.is_dir():
        raise ConfigError(
            expected=f"a file at {path}", got="a folder", do="name another file, or a folder without .csv"
        )
    name = next(iter(sheets))
    return [write_file(path, _text(sheets[name]))]


def _numbers(comparison: Comparison) -> Rows:
    yield ["strategy", "measure", "unit", "mean", "low", "high", "seeds", "difference", "difference_low",
           "difference_high", "uniform_random"]  # fmt: skip
    for strategy in comparison.strategies:
        for column in COMPARISON_COLUMNS:
            value, off = strategy.values.get(column.key), strategy.differences.get(column.key)
            if value is not None:
                yield [strategy.name, column.key, column.unit, value.mean, value.low, value.high, value.n,
                       off and off.mean, off and off.low, off and off.high,
                       comparison.noise_floor.get(column.key)]  # fmt: skip


def _steps(runs: Sequence[Run]) -> Rows:
    names = sorted({name for run in runs for step in run.steps for name in step.balance})
    yield ["run", "strategy", "seed", "step", "loss", "lr", "grad_norm", "tokens", "seconds", *names]
    for run in runs:
        for step in run.steps:
            yield [*_who(run), step.step, step.loss, step.lr, step.grad_norm, step.tokens, step.seconds,
                   *(step.balance.get(name) for name in names)]  # fmt: skip


def _evaluations(runs: Sequence[Run]) -> Rows:
    yield ["run", "strategy", "seed", "step", "domain", "loss", "bits_per_byte", "tokens"]
    for run in runs:
        for one in run.evaluations:
            for domain, loss in one.loss.items():
                yield [*_who(run), one.step, domain, loss, one.bits_per_byte.get(domain), one.tokens.get(domain)]


def _loads(runs: Sequence[Run]) -> Rows:
    yield ["run", "strategy", "seed", "step", "layer", "expert", "choices"]
    for run in runs:
        for load in run.loads:
            for layer, counts in enumerate(load.counts):
                for expert, count in enumerate(counts):
                    yield [*_who(run), load.step, layer, expert, count]


def _layers(found: Sequence[NamedInspection]) -> Rows:
    heads = [
        part
        for column in LAYER_COLUMNS
        for part in (column.label, *([f"{column.label}, {column.chance}"] * bool(column.floor)))
    ]
    yield ["model", "step", "layer", "name", *heads, "dead", "idle"]
    for one in found:
        for index, layer in enumerate(one.inspection.layers):
            cells = []
            for column in LAYER_COLUMNS:
                cells += [column.read(layer), *([column.floor(layer)] if column.floor else [])]
            yield [one.name, one.step, index, layer.name, *cells, len(layer.dead), len(layer.idle)]


def _domains(found: Sequence[NamedInspection]) -> Rows:
    yield ["model", "domain", "layer", "expert", "choices", "frequency"]
    for one in found:
        frequency_DLE = one.inspection.frequency_DLE()
        for d, domain in enumerate(one.inspection.domains):
            for l, layer in enumerate(one.inspection.layers):
                for e in range(layer.num_experts):
                    count = int(one.inspection.arrays.counts_DLE[d, l, e])
                    yield [one.name, domain.name, l, e, count, float(f"{frequency_DLE[d, l, e]:.6g}")]


def _who(run: Run) -> list[Any]:
    return [run.path.name, run.header.strategy, run.header.seed]


def _text(rows: Iterable[Sequence[Any]]) -> str:
    made = io.StringIO()
    csv.writer(made, lineterminator="\n").writerows([_cell(value) for value in row] for row in rows)
    return made.getvalue().encode("utf-8", "replace").decode()


def _cell(value: Any) -> Any:
    """Prefixes text that a spreadsheet would run as a formula with an apostrophe; NaN becomes an empty cell.

    >>> _cell("=1+1"), _cell(-1.5), _cell(float("nan"))
    ("'=1+1", -1.5, None)
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r") else value
