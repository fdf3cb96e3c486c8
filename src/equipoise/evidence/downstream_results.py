"""How many questions each model answered right, with intervals, and what sets two models apart on the same questions.

The interval of a difference says what these two models would do on other questions of this kind. What another seed of
the same strategy would do it does not say: for that there are the seeds, and two seeds of one strategy side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from ..report.data.formatting import clip
from ..report.data.statistics import paired_difference
from ..report.text.table import table
from .downstream_tasks import CHOICES, OTHERS, SAME, Question

__all__ = ["Answered", "Pair", "Share", "accuracy", "difference", "pairs_of", "render_answers", "to_json"]

Z = 1.959964  # of a two-sided 95 % interval
TITLES = {SAME: "the same domain", OTHERS: "other domains"}
SPAN = "wrong choices from"


@dataclass(frozen=True)
class Answered:
    """One run's answers; ``right`` has a truth value for each question of a task."""

    run: str
    strategy: str
    seed: int
    step: int
    weights: str  # a digest of the exported files
    right: Mapping[str, Sequence[bool]]


@dataclass(frozen=True)
class Share:
    """A share, or a difference of two, with its 95 % interval; ``n`` questions, or seeds."""

    value: float
    low: float
    high: float
    n: int


class Pair(NamedTuple):
    """Two rows that are compared: what they are, of which seeds, and the difference in each task."""

    name: str
    seeds: str
    gaps: dict[str, Share]


def accuracy(right: Sequence[bool]) -> Share:
    """The share of right answers with Wilson's interval, which stays within 0 and 1.

    >>> share = accuracy([True] * 30 + [False] * 70)
    >>> share.value, round(share.low, 3), round(share.high, 3), share.n
    (0.3, 0.219, 0.396, 100)
    """
    n, value = len(right), sum(right) / len(right)
    middle, half = value + Z**2 / (2 * n), Z * math.sqrt(value * (1 - value) / n + Z**2 / (4 * n**2))
    return Share(value, (middle - half) / (1 + Z**2 / n), (middle + half) / (1 + Z**2 / n), n)


def difference(ours: Sequence[bool], theirs: Sequence[bool]) -> Share:
    """Our share minus theirs on the same questions, with Agresti and Min's interval for matched pairs.

    Only the questions that one of the two alone got right speak, as in McNemar's test; half a question is added to each
    of the four ways in which two can answer, so that few such questions do not make the interval too narrow.

    >>> gap = difference([True] * 12 + [False] * 88, [True] * 10 + [False] * 90)
    >>> gap.value, round(gap.low, 3), round(gap.high, 3), gap.n
    (0.02, -0.013, 0.053, 100)
    """
    n = len(ours)
    more = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    less = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    m, gap = n + 2, more - less
    half = Z * math.sqrt(max(more + less + 1 - gap**2 / m, 0.0)) / m
    return Share(gap / n, gap / m - half, gap / m + half, n)


def pairs_of(runs: Sequence[Answered], baseline: str) -> list[Pair]:
    """Each strategy minus the baseline, seed by seed and over the seeds; then each strategy's seeds among themselves.

    The interval over seeds is Student's t of the seeds' differences: the only one here that speaks of strategies.
    """
    known: dict[str, dict[int, Answered]] = {}
    for one in runs:
        known.setdefault(one.strategy, {})[one.seed] = one
    found: list[Pair] = []
    for strategy, seeds in known.items():
        name, theirs = f"{strategy} - {baseline}", known[baseline]
        both = [] if strategy == baseline else sorted(seeds.keys() & theirs.keys())
        found += [Pair(name, str(seed), _gaps(seeds[seed], theirs[seed])) for seed in both]
        if len(both) > 1:
            found.append(Pair(name, "all", _over_seeds(found[-len(both) :])))
    for strategy, seeds in known.items():
        found += [
            Pair(f"{strategy} - itself", f"{later} - {sooner}", _gaps(seeds[later], seeds[sooner]))
            for sooner, later in pairwise(sorted(seeds))
        ]
    return found


def render_answers(runs: Sequence[Answered], baseline: str) -> str:
    """Accuracies and differences as two tables of at most 80 columns.

    >>> one, two = (Answered(f"m{seed}", "micro", seed, 9, "", {SAME: [True, seed == 0] * 8}) for seed in (0, 1))
    >>> print(render_answers([one, two], "micro").partition("Differences")[0].rstrip())
    Right answers in % of 16 questions, with 95 % intervals; by chance 25
    ────────────────────────────────────────────
                              wrong choices from
    strategy   seed   step       the same domain
    micro         0      9   100.0 (80.6..100.0)
    micro         1      9     50.0 (28.0..72.0)
    """
    tasks = list(runs[0].right)
    titles = [TITLES[task] for task in tasks]
    rows = [
        [clip(one.strategy, 26), str(one.seed), str(one.step), *(_percent(accuracy(one.right[task])) for task in tasks)]
        for one in runs
    ]
    asked = " and ".join(str(len(runs[0].right[task])) for task in tasks)
    text = table(f"Right answers in % of {asked} questions, with 95 % intervals; by chance {100 // CHOICES}",
                 ["strategy", "seed", "step", *titles], rows, spans={SPAN: titles})  # fmt: skip
    pairs = pairs_of(runs, baseline)
    if not pairs:
        return text
    rows = [[clip(one.name, 26), one.seeds, *(_points(one.gaps[task]) for task in tasks)] for one in pairs]
    note = (
        "Intervals of one seed are over questions: these two models. Those of all seeds are over seeds: the strategies."
    )
    return f"{text}\n\n" + table("Differences in points on the same questions, with 95 % intervals",
                                 ["pair", "seed", *titles], rows, note, spans={SPAN: titles})  # fmt: skip


def to_json(
    runs: Sequence[Answered], baseline: str, questions: Mapping[str, Sequence[Question]], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything as plain numbers, accuracies by domain too; shares are between 0 and 1."""
    return {
        "settings": dict(settings),
        "questions": {task: len(of_task) for task, of_task in questions.items()},
        "runs": [
            {"run": one.run, "strategy": one.strategy, "seed": one.seed, "step": one.step, "weights": one.weights}
            | {"tasks": {task: _of_task(right, questions[task]) for task, right in one.right.items()}}
            for one in runs
        ],
        "baseline": baseline,
        "differences": [
            {"pair": one.name, "seeds": one.seeds, "tasks": {task: asdict(gap) for task, gap in one.gaps.items()}}
            for one in pairs_of(runs, baseline)
        ],
    }


def _of_task(right: Sequence[bool], questions: Sequence[Question]) -> dict[str, Any]:
    domains = dict.fromkeys(question.domain for question in questions)
    parts = {
        domain: [is_right for is_right, question in zip(right, questions, strict=True) if question.domain == domain]
        for domain in domains
    }
    return asdict(accuracy(right)) | {"domains": {domain: asdict(accuracy(part)) for domain, part in parts.items()}}


def _gaps(ours: Answered, theirs: Answered) -> dict[str, Share]:
    return {task: difference(right, theirs.right[task]) for task, right in ours.right.items()}


def _over_seeds(pairs: Sequence[Pair]) -> dict[str, Share]:
    found = {}
    for task in pairs[0].gaps:
        values = {i: pair.gaps[task].value for i, pair in enumerate(pairs)}
        over = paired_difference(values, dict.fromkeys(values, 0.0))  # they are differences already
        assert over is not None and over.low is not None and over.high is not None
        found[task] = Share(over.mean, over.low, over.high, over.n)
    return found


def _percent(share: Share) -> str:
    return f"{100 * share.value:.1f} ({100 * share.low:.1f}..{100 * share.high:.1f})"


def _points(gap: Share) -> str:
    return f"{100 * gap.value:+.1f} ({100 * gap.low:+.1f}..{100 * gap.high:+.1f})"
