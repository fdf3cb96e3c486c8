"""The tables of a comparison as data: cards, all numbers, domains, estimators, runs, policies."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from ..data.comparison import Comparison, StrategySummary
from ..data.comparison_columns import COMPARISON_COLUMNS, GROUPS, Column
from ..data.formatting import duration, fine_perplexity, number, percent, rough_perplexity, signed
from ..data.statistics import Difference, Estimate
from .rendering import minus
from .widgets import Cell, Part, Row, table

__all__ = ["card", "estimators_table", "frequency_table", "numbers_table", "per_domain_table", "policies_table",
           "runs_table", "widths_table"]  # fmt: skip

BY_KEY = {column.key: column for column in COMPARISON_COLUMNS}


def _stacked(comparison: Comparison, name: str, first: str, rows: list[Row]) -> Part:
    """A table with a column per strategy; it can be sorted if ``first`` names its rows, whose units are then one."""
    names = [one.name for one in comparison.strategies]
    return "stacked", {"name": name, "first": first, "strategies": names, "rows": rows}


def card(comparison: Comparison, strategy: StrategySummary, index: int) -> dict[str, Any]:
    """A strategy at a glance: specialization first, then perplexity with its difference from the baseline."""
    perplexity = strategy.values.get("perplexity")
    change, about = _delta(comparison, strategy, perplexity)
    facts = (
        ("Perplexity", rough_perplexity(perplexity.mean if perplexity else None)),
        ("MaxVio", _shown(strategy, BY_KEY["heldout_maxvio_global"])),
        ("Tokens/s", _shown(strategy, BY_KEY["tokens_per_second"])),
    )
    return {"name": strategy.name, "colour": index, "big": _shown(strategy, BY_KEY["mutual_information"]),
            "unit": "nats of domain information", "facts": facts, "change": change, "about": about,
            "about_first": False}  # fmt: skip


def _delta(
    comparison: Comparison, strategy: StrategySummary, perplexity: Estimate | None
) -> tuple[tuple[str, str], list[str]]:
    """The tone and text of the difference in perplexity, empty where there is none; and lines about it."""
    if not strategy.compared:
        return ("", ""), [f"at step {strategy.runs[0].seen_at}, not compared"]
    seeds = "one seed" if perplexity else "not evaluated"
    if perplexity and perplexity.n > 1:
        low, high = rough_perplexity(perplexity.low), rough_perplexity(perplexity.high)
        seeds = f"perplexity {low} to {high}, {perplexity.n} seeds"
    if strategy.name == comparison.baseline:
        return ("", ""), ["baseline", seeds] if len(comparison.strategies) > 1 else [seeds]
    difference = strategy.differences.get("perplexity")
    if difference is None:
        return ("", ""), [seeds]
    known = f"{seeds}, no interval"
    if difference.low is not None and difference.high is not None:
        known = f"95% {_interval(difference, ratio=True)}{'' if difference.is_clear else ': not told apart'}"
    change = _tone(difference, "lower"), minus(percent(difference.mean))
    return change, [f"perplexity against {comparison.baseline}", known]


def numbers_table(comparison: Comparison) -> Part:
    """All numbers of all strategies and what they mean; coloured, and bold if better, if the interval excludes 0."""
    rows: list[Row] = []
    for group in GROUPS:
        members = [one for one in COMPARISON_COLUMNS if one.group == group]
        members = [column for column in members if any(one.values.get(column.key) for one in comparison.strategies)]
        rows += [_row(comparison, column, group if column is members[0] else "") for column in members]
    return _stacked(comparison, "numbers", "", rows)


def _row(comparison: Comparison, column: Column, group: str) -> Row:
    cells = []
    for one in comparison.strategies:
        value, difference = one.values.get(column.key), one.differences.get(column.key)
        best = _tone(difference, column.better) == "good"
        cells.append(Cell(_shown(one, column), value.mean if value else "", _small(difference, column), best))
    floor = comparison.noise_floor.get(column.key)
    unit = f", {column.unit}" if column.unit not in ("", "bytes") else ""
    return Row(f"{column.label}{unit}", cells, number(floor, 2) if floor is not None else "", column.explain, group)


def _small(difference: Difference | None, column: Column) -> list[tuple[str, str]]:
    if difference is None or not any(difference.by_seed.values()) or not column.compared:
        return []
    show = percent if column.ratio else signed
    found = [(_tone(difference, column.better), minus(show(difference.mean)))]
    return found if difference.low is None else [*found, ("", _interval(difference, ratio=column.ratio))]


def _interval(difference: Difference, *, ratio: bool) -> str:
    """[low, high], in percent for a ratio."""
    bounds = (difference.low or 0.0, difference.high or 0.0)
    low, high = (signed(100 * one, 1) if ratio else signed(one) for one in bounds)
    return minus(f"[{low}, {high}]")


def _tone(difference: Difference | None, better: str) -> str:
    """CSS class: good, bad, or none if the interval includes zero or there is only one seed."""
    if not better or difference is None or not difference.is_clear:
        return ""
    return "good" if (difference.mean < 0) == (better == "lower") else "bad"


def _shown(strategy: StrategySummary, column: Column) -> str:
    value = strategy.values.get(column.key)
    return minus(column.show(value.mean if value else None, column.places))


def per_domain_table(comparison: Comparison) -> Part:
    rows = []
    for name in comparison.domains:
        cells = []
        for one in comparison.strategies:
            value, difference = one.domain_perplexity.get(name), one.domain_differences.get(name)
            tone, bits = _tone(difference, "lower"), one.domain_bits.get(name)
            small = [(tone, minus(percent(difference.mean)))] if difference else []
            small += [("", f"{number(bits.mean, 3)} b/B")] if bits else []
            shown, exact = (fine_perplexity(value.mean), value.mean) if value else ("–", "")
            cells.append(Cell(shown, exact, small, tone == "good"))
        rows.append(Row(name, cells))
    return _stacked(comparison, "domains", "Domain", rows)


def widths_table(comparison: Comparison) -> Part:
    """Which experts are used, by their width."""
    rows = []
    for width in sorted({width for one in comparison.strategies for width in one.load_by_width}):
        loads = [one.load_by_width.get(width) for one in comparison.strategies]
        rows.append(Row(str(width), [Cell(number(load, 2), "" if load is None else load) for load in loads]))
    return _stacked(comparison, "widths", "Width", rows)


def frequency_table(comparison: Comparison) -> Part | None:
    """Held-out loss by how frequent a token is; None where no run has it."""
    rows = []
    for side, group in (("input", "by the token that is read"), ("target", "by the token that is predicted")):
        tenths = max((len(one.tenth_losses.get(side, [])) for one in comparison.strategies), default=0)
        for i in range(tenths):
            cells = []
            for one in comparison.strategies:
                value = one.tenth_losses[side][i] if i < len(one.tenth_losses[side]) else None
                differences = one.tenth_differences.get(side, [])
                difference = differences[i] if i < len(differences) else None
                tone = _tone(difference, "lower")
                small = [(tone, minus(signed(difference.mean)))] if difference else []
                shown, exact = (number(value.mean, 3), value.mean) if value else ("–", "")
                cells.append(Cell(shown, exact, small, tone == "good"))
            ends = {0: "most frequent tenth", tenths - 1: "rarest tenth"}
            rows.append(Row(ends.get(i, f"tenth {i + 1}"), cells, "", "", group if i == 0 else ""))
    return _stacked(comparison, "tenths", "", rows) if rows else None


def estimators_table(comparison: Comparison) -> Part:
    rows = []
    for name in sorted({one.name for strategy in comparison.strategies for one in strategy.estimators}):
        cells = []
        for strategy in comparison.strategies:
            one = next((e for e in strategy.estimators if e.name == name), None)
            if one is None:
                cells.append(Cell("–", ""))
                continue
            small = [("", "in use")] * one.in_use + [("", minus(f"cos {number(one.cosine, 3)}"))]
            exact = one.relative_error if math.isfinite(one.relative_error) else ""
            cells.append(Cell(number(one.relative_error, 3), exact, small, one.in_use))
        rows.append(Row(name, cells))
    return _stacked(comparison, "estimators", "Estimator", rows)


def runs_table(comparison: Comparison) -> Part:
    rows = []
    for index, strategy in enumerate(comparison.strategies):
        for run in strategy.runs:
            steps = f"{run.step}" + (f" of {run.planned_steps}" if run.planned_steps not in (None, run.step) else "")
            rows.append([
                Cell(strategy.name, colour=index), Cell(run.seed, run.seed), Cell(run.status), Cell(steps, run.step),
                Cell(f"{run.tokens / 1e6:.1f} M", run.tokens), Cell(duration(run.seconds), run.seconds),
                Cell(codes=[Path(run.path).name]),
            ])  # fmt: skip
    heads = ["Strategy", "Seed", "Status", "Steps", "Tokens", "Time", "Folder"]
    return table("runs", "runs", heads, rows, left=(0, 2, 6))


def policies_table(comparison: Comparison) -> Part:
    rows = [
        [Cell(one.name, colour=index), Cell(codes=one.policies or ["no balancing"])]
        for index, one in enumerate(comparison.strategies)
    ]
    return table("policies", "policies", ["Strategy", "Policies"], rows, left=(0, 1))
