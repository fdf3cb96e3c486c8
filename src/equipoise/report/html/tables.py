"""The tables of a comparison as HTML: cards, all numbers, domains, estimators, runs, policies, configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path

from ..data.comparison import Comparison, StrategySummary
from ..data.comparison_columns import COMPARISON_COLUMNS, GROUPS, Column
from ..data.formatting import duration, fine_perplexity, number, percent, rough_perplexity, signed
from ..data.statistics import Difference, Estimate
from .widgets import breakable, cell, dot, safe, table

__all__ = ["card", "config_list", "estimators_table", "numbers_table", "per_domain_table", "policies_table",
           "runs_table"]  # fmt: skip

BY_KEY = {column.key: column for column in COMPARISON_COLUMNS}


def dots(comparison: Comparison) -> str:
    """Header cells of the strategies with their colours."""
    return "".join(
        f'<th scope="col"><i {dot(index)}></i>{breakable(one.name)}</th>'
        for index, one in enumerate(comparison.strategies)
    )


def _stacked(comparison: Comparison, name: str, first: str, rows: list[str], more: str = "") -> str:
    """A table with a column per strategy; on a phone each row becomes a heading above its values.

    It can be sorted unless ``more`` is given: a last header cell, for rows of different units.
    """
    sorts = "" if more else ' data-sorts="yes"'
    head = f'<tr><th scope="col">{first or "Measure"}</th>{dots(comparison)}{more}</tr>'
    n = len(comparison.strategies)
    return (
        f'<div class="wide{" few" if n <= 4 else ""}"><table class="stack" data-table="{name}"{sorts} '
        f'aria-label="{first or "all numbers"}" style="--n:{n}">'
        f"<thead>{head}</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def card(comparison: Comparison, strategy: StrategySummary, index: int) -> str:
    """A strategy at a glance: specialization first, then perplexity with its difference from the baseline."""
    perplexity = strategy.values.get("perplexity")
    facts = (
        ("Perplexity", rough_perplexity(perplexity.mean if perplexity else None), ""),
        ("MaxVio", _shown(strategy, BY_KEY["heldout_maxvio_global"]), ""),
        ("Tokens/s", _shown(strategy, BY_KEY["tokens_per_second"]), ""),
    )
    rows = "".join(f"<dt>{name}</dt><dd>{value} {unit}</dd>" for name, value, unit in facts)
    return f"""<article class="card" {dot(index)}>
<h3>{breakable(strategy.name)}</h3>
<p class="big">{_shown(strategy, BY_KEY["mutual_information"])} <small>nats of domain information</small></p>
<dl>{rows}</dl>
<p class="delta">{_delta(comparison, strategy, perplexity)}</p>
</article>"""


def _delta(comparison: Comparison, strategy: StrategySummary, perplexity: Estimate | None) -> str:
    if not strategy.compared:
        return f"at step {strategy.runs[0].seen_at}, not compared"
    seeds = ""
    if perplexity:
        low, high = rough_perplexity(perplexity.low), rough_perplexity(perplexity.high)
        seeds = f"perplexity {low} to {high}, {perplexity.n} seeds"
    seeds = seeds if perplexity and perplexity.n > 1 else "one seed" if perplexity else "not evaluated"
    if strategy.name == comparison.baseline:
        return f"{'baseline<br>' if len(comparison.strategies) > 1 else ''}{seeds}"
    difference = strategy.differences.get("perplexity")
    if difference is None:
        return seeds
    text = f'<b class="{_tone(difference, "lower")}">{_minus(percent(difference.mean))}</b>'
    text += f" perplexity against {safe(comparison.baseline)}"
    if difference.low is None or difference.high is None:
        return f"{text}<br>{seeds}, no interval"
    apart = "" if difference.is_clear else ": not told apart"
    return f"{text}<br>95% {_interval(difference, ratio=True)}{apart}"


def numbers_table(comparison: Comparison) -> str:
    """All numbers of all strategies and what they mean; coloured, and bold if better, if the interval excludes 0."""
    span = len(comparison.strategies) + 2
    rows = []
    for group in GROUPS:
        members = [one for one in COMPARISON_COLUMNS if one.group == group]
        members = [column for column in members if any(one.values.get(column.key) for one in comparison.strategies)]
        if members:
            rows.append(f'<tr class="group"><th colspan="{span}" scope="rowgroup">{group}</th></tr>')
        rows += [_row(comparison, column) for column in members]
    return _stacked(comparison, "numbers", "", rows, '<th class="why" scope="col">What it means</th>')


def _row(comparison: Comparison, column: Column) -> str:
    values = [one.values.get(column.key) for one in comparison.strategies]
    cells = []
    for value, one in zip(values, comparison.strategies, strict=True):
        difference = one.differences.get(column.key)
        small = _small(difference, column)
        mark = ' class="best"' if _tone(difference, column.better) == "good" else ""
        exact = value.mean if value is not None else ""
        shown = f'<span class="value">{_shown(one, column)}</span>{small}'
        cells.append(f'<td{mark} data-value="{exact}">{shown}</td>')
    floor = comparison.noise_floor.get(column.key)
    note = f'<span class="floor">uniform random: {number(floor, 2)}</span>' if floor is not None else ""
    unit = f", {column.unit}" if column.unit not in ("", "bytes") else ""
    return (
        f'<tr><th scope="row">{column.label}{unit}{note}</th>{"".join(cells)}'
        f'<td class="why">{escape(column.explain)}</td></tr>'
    )


def _small(difference: Difference | None, column: Column) -> str:
    if difference is None or not any(difference.by_seed.values()) or not column.compared:
        return ""
    show = percent if column.ratio else signed
    text = f'<small class="{_tone(difference, column.better)}">{_minus(show(difference.mean))}</small>'
    if difference.low is not None:
        text += f" <small>{_interval(difference, ratio=column.ratio)}</small>"
    return text


def _interval(difference: Difference, *, ratio: bool) -> str:
    """[low, high], in percent for a ratio."""
    bounds = (difference.low or 0.0, difference.high or 0.0)
    low, high = (signed(100 * one, 1) if ratio else signed(one) for one in bounds)
    return _minus(f"[{low}, {high}]")


def _tone(difference: Difference | None, better: str) -> str:
    """CSS class: good, bad, or none if the interval includes zero or there is only one seed."""
    if not better or difference is None or not difference.is_clear:
        return ""
    return "good" if (difference.mean < 0) == (better == "lower") else "bad"


def _shown(strategy: StrategySummary, column: Column) -> str:
    value = strategy.values.get(column.key)
    return _minus(column.show(value.mean if value else None, column.places))


def per_domain_table(comparison: Comparison) -> str:
    rows = []
    for name in comparison.domains:
        values = [one.domain_perplexity.get(name) for one in comparison.strategies]
        cells = []
        for value, one in zip(values, comparison.strategies, strict=True):
            difference, bits = one.domain_differences.get(name), one.domain_bits.get(name)
            tone = _tone(difference, "lower")
            small = f'<small class="{tone}">{_minus(percent(difference.mean))}</small>' if difference else ""
            small += f" <small>{number(bits.mean, 3)} b/B</small>" if bits else ""
            mark = ' class="best"' if tone == "good" else ""
            shown = fine_perplexity(value.mean if value else None)
            exact = value.mean if value else ""
            cells.append(f'<td{mark} data-value="{exact}"><span class="value">{shown}</span>{small}</td>')
        rows.append(f'<tr><th scope="row" class="left">{safe(name)}</th>{"".join(cells)}</tr>')
    return _stacked(comparison, "domains", "Domain", rows)


def estimators_table(comparison: Comparison) -> str:
    names = sorted({one.name for strategy in comparison.strategies for one in strategy.estimators})
    rows = []
    for name in names:
        cells = []
        for strategy in comparison.strategies:
            one = next((e for e in strategy.estimators if e.name == name), None)
            if one is None:
                cells.append('<td data-value="">–</td>')
                continue
            mark = ' class="best"' if one.in_use else ""
            used = "<small>in use</small> " if one.in_use else ""
            cosine = f"<small>cos {_minus(number(one.cosine, 3))}</small>"
            shown = number(one.relative_error, 3)
            exact = one.relative_error if math.isfinite(one.relative_error) else ""
            cells.append(f'<td{mark} data-value="{exact}"><span class="value">{shown}</span>{used}{cosine}</td>')
        rows.append(f'<tr><th scope="row" class="left">{safe(name)}</th>{"".join(cells)}</tr>')
    return _stacked(comparison, "estimators", "Estimator", rows)


def runs_table(comparison: Comparison) -> str:
    rows = []
    for index, strategy in enumerate(comparison.strategies):
        for run in strategy.runs:
            steps = f"{run.step}" + (f" of {run.planned_steps}" if run.planned_steps not in (None, run.step) else "")
            rows.append(
                cell(f"<i {dot(index)}></i>{safe(strategy.name)}", left=True) + cell(str(run.seed), run.seed)
                + cell(safe(run.status), left=True) + cell(steps, run.step)
                + cell(f"{run.tokens / 1e6:.1f} M", run.tokens) + cell(duration(run.seconds), run.seconds)
                + cell(f"<code>{safe(Path(run.path).name)}</code>", left=True)
            )  # fmt: skip
    heads = ["Strategy", "Seed", "Status", "Steps", "Tokens", "Time", "Folder"]
    return table("runs", "runs", heads, rows, left=(0, 2, 6))


def policies_table(comparison: Comparison) -> str:
    rows = [
        cell(f"<i {dot(index)}></i>{safe(one.name)}", kind="th", left=True)
        + cell("<br>".join(f"<code>{safe(policy)}</code>" for policy in one.policies or ["no balancing"]), left=True)
        for index, one in enumerate(comparison.strategies)
    ]
    return table("policies", "policies", ["Strategy", "Policies"], rows, left=(0, 1))


def config_list(items: dict[str, object]) -> str:
    return f'<ul class="config">{"".join(_config_rows(items))}</ul>'


def _config_rows(items: dict[str, object]) -> Iterator[str]:
    for key, value in items.items():
        text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        yield f"<li><span>{safe(key)}</span><b>{safe(text) or '–'}</b></li>"


def _minus(text: str) -> str:
    return text.replace("-", "−")
