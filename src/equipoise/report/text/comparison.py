"""A comparison as plain text of at most 80 columns: the headline, then tables that also read well in a log file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from ..data.comparison import Comparison, StrategySummary
from ..data.comparison_columns import COMPARISON_COLUMNS, Column
from ..data.formatting import clean, clip, fine_perplexity, number, percent, plural, signed, width
from ..data.statistics import Difference, Estimate
from .table import COLUMNS, table, wrap

__all__ = ["render_terminal"]

NAME = 18  # the widest a strategy's column gets
Cell = Callable[[StrategySummary], str]


def render_terminal(comparison: Comparison) -> str:
    """The comparison as text: no line is wider than 80 columns, and control characters in names are escaped."""
    blocks = [
        wrap(_title(comparison)),
        wrap(comparison.headline),
        wrap(comparison.quality),
        *("\n".join(wrap(f"! {text}", "  ") for text in texts) for texts in _remarks(comparison) if texts),
        _quality(comparison),
        _balance(comparison),
        _cost(comparison),
        _widths(comparison),
        *_domains(comparison),
        *_estimators(comparison),
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _title(comparison: Comparison) -> str:
    facts, seeds = comparison.facts, {run.seed for one in comparison.strategies for run in one.runs}
    parts = [
        f"{len(comparison.strategies)} strateg{'y' if len(comparison.strategies) == 1 else 'ies'}",
        f"{len(seeds)} seed{'' if len(seeds) == 1 else 's'}",
        f"{comparison.step} steps" if comparison.step is not None else "no common step",
        f"{facts['tokens'] / 1e6:.1f} M tokens each" if facts["tokens"] >= 1e5 else f"{facts['tokens']:,} tokens each",
        f"{plural(facts['layers'], 'MoE layer')} x {facts['experts']} experts, top-{facts['top_k']}",
    ]
    if widths := facts.get("expert_widths"):
        parts.append(f"widths {min(widths)} to {max(widths)}")
    return ", ".join(parts)


def _remarks(comparison: Comparison) -> Iterator[list[str]]:
    yield comparison.warnings
    yield [clean(text) for text in comparison.problems[:12]]


def _quality(comparison: Comparison) -> str:
    title = "Held-out text" + (f" after {comparison.step} steps" if comparison.step is not None else "")
    note = (
        "info: nats that the choice of an expert tells about the domain; chance: the same with shuffled labels; "
        "top-K: probability on the chosen experts."
    )
    if any(one.n > 1 for strategy in comparison.strategies for one in strategy.differences.values() if one):
        note += " [ ]: 95% interval of the difference, paired by seed."
    return _table(title, comparison, ("Quality", "Specialization"), note)


def _balance(comparison: Comparison) -> str:
    note = (
        "MaxVio = largest load / mean load - 1: 0 is even, 1 is an expert with twice its share. In training: over the "
        "global batch, a micro-batch, a sequence, mean of the last quarter of the steps. dead: experts without a token."
    )
    groups = ("Balance in training", "Balance on held-out text")
    return _table("Balance (MaxVio)", comparison, groups, note, noise_floor=True)


def _cost(comparison: Comparison) -> str:
    single = all(len(one.runs) == 1 for one in comparison.strategies) and len(comparison.strategies) > 1
    note = "One run each: on a machine that does other work, step times differ by several percent by themselves."
    return _table("Cost", comparison, ("Cost",), note if single else "", last={"runs": _statuses})


def _statuses(strategy: StrategySummary) -> str:
    counts: dict[str, int] = {}
    for run in strategy.runs:
        text = clip(clean(run.status), 12)
        if run.status != "finished":
            text += f" at {run.step}"
        counts[text] = counts.get(text, 0) + 1
    return clip(", ".join(f"{n} {text}" for text, n in counts.items()), 28)


def _widths(comparison: Comparison) -> str:
    """Which experts are used, by their width; empty where all are alike."""
    used = [one for one in comparison.strategies if one.load_by_width]
    widths = sorted({width for one in used for width in one.load_by_width})
    shown = widths if len(widths) <= 8 else [widths[round(i * (len(widths) - 1) / 7)] for i in range(8)]
    rows = [[clip(clean(one.name), NAME), *(number(one.load_by_width.get(w), 2) for w in shown)] for one in used]
    note = "Load of an expert of this width over the even one, on held-out text, mean over layers: 1 is its share."
    return table("Load by expert width", ["strategy", *map(str, shown)], rows, note) if used else ""


def _domains(comparison: Comparison) -> Iterator[str]:
    """Perplexity with a column per domain, in as many tables as fit the width."""
    first = max(8, *(min(NAME, width(clean(one.name))) for one in comparison.strategies))
    wide = min(14, max(8, (COLUMNS - first) // max(1, len(comparison.domains)) - 2))
    for names in _chunks(comparison.domains, wide, first):
        rows = [
            [clip(clean(one.name), NAME), *(fine_perplexity(_mean(one.domain_perplexity.get(name))) for name in names)]
            for one in comparison.strategies
        ]
        yield table("Perplexity by domain", ["strategy", *(clip(clean(name), wide) for name in names)], rows)


def _estimators(comparison: Comparison) -> Iterator[str]:
    names = sorted({one.name for strategy in comparison.strategies for one in strategy.estimators})
    chunks = list(_chunks(names, 13))
    for chunk in chunks:
        rows = []
        for strategy in comparison.strategies:
            cells = {
                one.name: f"{number(one.relative_error, 2)} {number(one.cosine, 3)}{'*' if one.in_use else ' '}"
                for one in strategy.estimators
            }
            rows.append([clip(clean(strategy.name), NAME), *(cells.get(name, "– ") for name in chunk)])
        note = "Two numbers each: relative error and cosine, means over the steps at which they were measured."
        if any(one.in_use for strategy in comparison.strategies for one in strategy.estimators):
            note += " *: what this strategy trained with."
        title = "Gradient of the balance loss against the exact one, by estimator of f"
        header = ["strategy", *(clip(clean(name), 12) + " " for name in chunk)]
        yield table(title, header, rows, note if chunk is chunks[-1] else "")


def _chunks(names: Sequence[str], wide: int, first: int = NAME) -> Iterator[Sequence[str]]:
    """Splits names into groups of as many columns of this width as fit beside the strategy."""
    per_table = max(1, (COLUMNS - first) // (wide + 2))
    for start in range(0, len(names), per_table):
        yield names[start : start + per_table]


def _mean(value: Estimate | None) -> float | None:
    return value.mean if value else None


def _value(column: Column, places: int | None) -> Cell:
    return lambda strategy: column.show(_mean(strategy.values.get(column.key)), places)


def _difference(column: Column, baseline: str) -> Cell:
    def cell(strategy: StrategySummary) -> str:
        if (difference := strategy.differences.get(column.key)) is not None:
            return _shown(difference)
        return _why_none(strategy, baseline) if column.group == "Quality" else ""  # the first table says it for all

    return cell


def _why_none(strategy: StrategySummary, baseline: str) -> str:
    if not strategy.compared:
        return f"at step {strategy.runs[0].seen_at}"
    return "" if strategy.name == baseline else "–"


def _shown(difference: Difference) -> str:
    """A relative difference in percent, with its interval if there is one."""
    if difference.low is None or difference.high is None:
        return percent(difference.mean)
    return f"{percent(difference.mean)} [{signed(100 * difference.low, 1)}, {signed(100 * difference.high, 1)}]"


def _table(
    title: str,
    comparison: Comparison,
    groups: Sequence[str],
    note: str = "",
    *,
    noise_floor: bool = False,
    last: dict[str, Cell] | None = None,
) -> str:
    """The columns of these groups, strategies in rows; a column that no strategy fills is left out.

    ``noise_floor`` adds a row with what random routing shows; ``last`` are columns beside those of the groups.
    """
    cells: dict[str, Cell] = {}
    floors: list[str] = []
    spans: dict[str, list[str]] = {}
    for column in COMPARISON_COLUMNS:
        if column.group not in groups or (shown := column.terminal) is None:
            continue
        cells[shown.heading] = _value(column, shown.places)
        floors.append(number(comparison.noise_floor.get(column.key), shown.places) if column.noise_tokens else "")
        if shown.over:
            spans.setdefault(shown.over, []).append(shown.heading)
        if shown.difference:
            heading = shown.difference.format(baseline=clip(clean(comparison.baseline), 12))
            cells[heading] = _difference(column, comparison.baseline)
            floors.append("")
    cells |= last or {}
    rows = [[clip(clean(one.name), NAME), *(cell(one) for cell in cells.values())] for one in comparison.strategies]
    rows += [["uniform random", *floors]] if noise_floor else []
    kept = [0] + [i for i in range(1, len(cells) + 1) if any(row[i] not in ("", "–") for row in rows)]
    if len(kept) == 1:
        return ""
    header = ["strategy", *cells]
    return table(title, [header[i] for i in kept], [[row[i] for i in kept] for row in rows], note, spans=spans)
