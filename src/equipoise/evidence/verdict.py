"""What the runs say of a claim: paired differences, their intervals and tests, and one word.

A contrast is judged at the 5 % level. For "lower" and "higher" that is a paired two-sided t-test and the side its mean
is on; for "equal" two one-sided tests (TOST) against the margin. Among the judged contrasts of the primary claims the
p-values are Holm's. A contrast that is neither confirmed nor refuted is undecided, whatever its mean.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, variance
from typing import Any

from scipy import stats

from ..report.data.statistics import Difference, paired_difference
from .claim import Claim, Contrast
from .run_summary import RunSummary, run_key, seed_of

__all__ = ["LEVEL", "ClaimVerdict", "Judged", "holm", "judge_all"]

LEVEL = 0.05
CONFIRMED, REFUTED, UNDECIDED, SHOWN = "confirmed", "refuted", "undecided", ""
MISSING, PARTIAL = "not run", "unfinished"  # a criterion that names eight pairs is not judged by five

Summaries = Mapping[tuple[str, int], Mapping[str, RunSummary]]  # key and seed -> text -> run


@dataclass(frozen=True)
class Judged:
    """One contrast: the runs of both sides, the difference, its p-value and the word."""

    contrast: Contrast
    runs: Mapping[str, Mapping[int, RunSummary]]  # "treated", "baseline" -> seed -> run, all of one text
    difference: Difference | None
    margin: float | None
    p: float  # of the test; Holm's in the primary family; NaN where there is none
    verdict: str

    @property
    def treated(self) -> float:
        """Mean over the seeds that both sides have; NaN where there are none."""
        return self._mean("treated")

    @property
    def baseline(self) -> float:
        return self._mean("baseline")

    @property
    def pairs(self) -> int:
        """Seeds that both sides have on record, those that diverged among them."""
        return len(self.runs["treated"].keys() & self.runs["baseline"].keys())

    @property
    def diverged(self) -> int:
        """Runs of either side whose loss became NaN; they are in no mean."""
        return sum(run.status == "diverged" for of_side in self.runs.values() for run in of_side.values())

    def _mean(self, side: str) -> float:
        seeds = self.difference.by_seed if self.difference else {}
        return fmean(self.contrast.read(self.runs[side][seed], side) for seed in seeds) if seeds else math.nan


@dataclass(frozen=True)
class ClaimVerdict:
    """A claim with its contrasts: unfinished while one is not run; refuted if one is, else undecided if one is."""

    claim: Claim
    judged: list[Judged]
    seconds: float  # of all its runs, on one core

    @property
    def verdict(self) -> str:
        words = {one.verdict for one in self.judged if one.contrast.criterion != "any"}
        if len(words) > 1 and words & {MISSING, PARTIAL}:
            return PARTIAL
        for word in (MISSING, PARTIAL, REFUTED, UNDECIDED, CONFIRMED):
            if word in words:
                return word
        missing = [one.contrast.seeds - one.pairs for one in self.judged]
        return (PARTIAL if any(one.pairs for one in self.judged) else MISSING) if any(missing) else SHOWN

    @property
    def leading(self) -> Judged | None:
        """The contrast that stands for the claim in a row: the first with its verdict, else with a criterion, that has
        runs."""
        known = [one for one in self.judged if one.difference]
        with_criterion = [one for one in known if one.contrast.criterion != "any"]
        decides = [one for one in with_criterion if one.verdict == self.verdict]
        return next(iter([*decides, *with_criterion, *known]), None)


def judge_all(claims: Sequence[Claim], runs: Iterable[RunSummary]) -> list[ClaimVerdict]:
    """All claims, the primary ones with one error rate among them.

    The text of an installation differs between machines: a pair is of one text, and a contrast of the text that has the
    most pairs.
    """
    known: dict[tuple[str, int], dict[str, RunSummary]] = {}
    for run in runs:
        known.setdefault((run.key, run.seed), {})[run.corpus] = run
    found = [_judge_claim(claim, known) for claim in claims]
    tested = [
        (at, place)
        for at, one in enumerate(found)
        for place, judged in enumerate(one.judged)
        if one.claim.family == "primary" and judged.contrast.criterion != "any"
    ]
    # what is still to be run counts as well: the correction is that of the whole family from the first verdict on
    raw = [found[at].judged[place].p for at, place in tested]
    adjusted = holm([p if math.isfinite(p) else 1.0 for p in raw])
    for (at, place), p, before in zip(tested, adjusted, raw, strict=True):
        old = found[at].judged[place]
        if not math.isfinite(before):
            continue
        word = old.verdict if old.verdict == PARTIAL else _word(old.contrast, old.difference, old.margin, p)
        found[at].judged[place] = replace(old, p=p, verdict=word)
    return found


def _judge_claim(claim: Claim, runs: Summaries) -> ClaimVerdict:
    used = {(run_key(config), seed_of(config)) for config in claim.runs()}
    seconds = math.fsum(run.seconds for at in sorted(used) for run in runs.get(at, {}).values())
    return ClaimVerdict(claim, [_judge(claim, contrast, runs) for contrast in claim.contrast], seconds)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down p-values: rejecting those at or below a level keeps the chance of any false one at it.

    >>> [round(one, 3) for one in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=p.__getitem__)
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = largest
    return adjusted


def _judge(claim: Claim, contrast: Contrast, runs: Summaries) -> Judged:
    difference, of_sides = _paired(claim, contrast, runs)
    margin = contrast.margin if not contrast.margin_of else _share(claim, contrast, contrast.margin_of, runs)
    margin = None if margin is None else abs(margin)
    if contrast.around_of:
        predicted = _share(claim, contrast, contrast.around_of, runs)
        margin = None if predicted is None else margin  # nothing to be equal to yet
        contrast = replace(contrast, around=predicted or 0.0)
    p = _p(contrast, difference, margin)
    word = _word(contrast, difference, margin, p)
    judged = Judged(contrast, of_sides, difference, margin, p, word)
    partial = 0 < judged.pairs < contrast.seeds and contrast.criterion != "any"
    return replace(judged, verdict=PARTIAL) if partial else judged


def _share(claim: Claim, contrast: Contrast, of: Mapping[str, Any], runs: Summaries) -> float | None:
    """A share of another mean difference; None where that is not on record."""
    if "cell" in of:
        other = next(one for one in claim.contrast if one.cell == of["cell"])
    else:
        other = replace(contrast, treated=of["treated"], baseline=of["baseline"], criterion="any", around=0.0,
                        margin=None, margin_of={}, around_of={}, baseline_settings={})  # fmt: skip
    known = _paired(claim, other, runs)[0]
    return None if known is None else known.mean * of["share"]


def _paired(
    claim: Claim, contrast: Contrast, runs: Summaries
) -> tuple[Difference | None, dict[str, dict[int, RunSummary]]]:
    """Treated - baseline over the seeds that both sides have on record, and all their runs of that text."""
    sides = {
        side: {seed: runs.get((run_key(claim.run(contrast, side, seed)), seed), {}) for seed in contrast.which}
        for side in ("treated", "baseline")
    }
    both = [sides["treated"][seed].keys() & sides["baseline"][seed].keys() for seed in contrast.which]
    counted = Counter(text for texts in both for text in texts)
    text = max(sorted(counted), key=counted.__getitem__, default="")
    found = {
        side: {seed: one[text] for seed, one in of_seeds.items() if text in one} for side, of_seeds in sides.items()
    }
    values = {
        side: {seed: contrast.read(run, side) for seed, run in of_side.items()} for side, of_side in found.items()
    }
    return paired_difference(values["treated"], values["baseline"]), found


def _p(contrast: Contrast, difference: Difference | None, margin: float | None) -> float:
    """Of the contrast's test; NaN where it has none, or fewer than two pairs."""
    if contrast.criterion == "any" or difference is None or difference.n < 2:
        return math.nan
    values = list(difference.by_seed.values())
    off = abs(difference.mean - contrast.around)
    if max(values) == min(values):  # no spread: the same number each time
        equal = margin is not None and off < margin
        return float(not (equal if contrast.criterion == "equal" else values[0] != 0))
    errors, degrees = math.sqrt(variance(values) / len(values)), len(values) - 1
    if contrast.criterion != "equal":
        return 2 * float(stats.t.sf(off / errors, degrees))
    if margin is None:
        return math.nan
    return float(stats.t.sf((margin - off) / errors, degrees))  # the worse of the two one-sided tests


def _word(contrast: Contrast, difference: Difference | None, margin: float | None, p: float) -> str:
    if difference is None:
        return MISSING
    if contrast.criterion == "any":
        return SHOWN
    if not math.isfinite(p):
        return UNDECIDED
    if contrast.criterion == "equal":
        assert margin is not None
        outside = difference.low is not None and difference.high is not None and (
            difference.low > contrast.around + margin or difference.high < contrast.around - margin
        )  # fmt: skip
        return CONFIRMED if p <= LEVEL else REFUTED if outside else UNDECIDED
    if p > LEVEL:
        return UNDECIDED
    return CONFIRMED if (difference.mean < 0) == (contrast.criterion == "lower") else REFUTED
