"""Claims and verdicts in a terminal, 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import stdev

from scipy import stats

from ..report.text.table import table, wrap
from .claim import Contrast
from .law import cells_of, fit_laws, law_words
from .verdict import ClaimVerdict, Judged

__all__ = ["criterion", "interval", "pairs", "render_again", "render_list", "render_verdict", "signed_of"]


def render_list(judged: Sequence[ClaimVerdict]) -> str:
    """All claims, one line each: name, verdict, pairs on record, what it says."""
    rows = [[one.claim.name, one.verdict or "shown", pairs(one), one.claim.title] for one in judged]
    lines = [f"{name:<6} {verdict:<10} {on_record:>7}  {title}" for name, verdict, on_record, title in rows]
    head = f"{'claim':<6} {'verdict':<10} {'pairs':>7}  what it says"
    return "\n".join(wrap(line, " " * 26) for line in [head, *lines])


def render_verdict(one: ClaimVerdict) -> str:
    """A claim, its contrasts as a table, and the word."""
    claim = one.claim
    rows = [
        [judged.contrast.cell, f"{judged.contrast.treated} - {judged.contrast.baseline}", judged.contrast.measured,
         interval(judged), f"{judged.difference.n if judged.difference else 0}/{judged.contrast.seeds}", judged.verdict]
        for judged in one.judged
    ]  # fmt: skip
    head = [wrap(f"{claim.name}: {claim.title}"), wrap(f"published: {claim.published} ({claim.source})"),
            f"verdict: {one.verdict or 'shown, not judged'}"]  # fmt: skip
    lines = [wrap(f"{cell}, {pair}", "  ") + f"\n{_beside(measure)} {text:>32} {n:>6}  {word}"
             for cell, pair, measure, text, n, word in rows]  # fmt: skip
    cells = cells_of(one)
    laws = [wrap(law_words(one, cells, fits))] if (fits := fit_laws(cells)) else []
    return "\n".join([*head, *laws, "", *lines])


def _beside(measure: str) -> str:
    """In the first 26 columns, or on a line of its own."""
    return f"  {measure:<24}" if len(measure) <= 24 else f"  {measure}\n{'':26}"


def render_again(now: Sequence[ClaimVerdict], before: Sequence[ClaimVerdict]) -> str:
    """Whether each new mean difference lies where the runs on record predict it (95 %, Student's t)."""
    known = {one.claim.name: one for one in before}
    rows = []
    for one in now:
        for new, old in zip(one.judged, known[one.claim.name].judged, strict=True):
            where = "not run"
            if new.difference and old.difference and old.difference.n > 1:
                half = _prediction(old, new.difference.n)
                inside = abs(new.difference.mean - old.difference.mean) <= half
                where = f"{'inside' if inside else 'OUTSIDE'} {old.difference.mean:+.4f} ± {half:.4f}"
            mean = f"{new.difference.mean:+.4f}" if new.difference else ""
            rows.append([one.claim.name, new.contrast.measured, mean, where])
    return table("Trained again, against what is on record", ["claim", "measure", "again", "predicted"], rows)


def pairs(one: ClaimVerdict) -> str:
    """How many of the pairs that a claim wants are on record."""
    return (
        f"{sum(j.difference.n if j.difference else 0 for j in one.judged)}/{sum(j.contrast.seeds for j in one.judged)}"
    )


def interval(judged: Judged) -> str:
    """The difference with its 95 % interval."""
    difference = judged.difference
    if difference is None:
        return ""
    mean, *ends = (signed_of(judged.contrast, value) for value in (difference.mean, difference.low, difference.high)
                   if value is not None)  # fmt: skip
    return f"{mean} ({' to '.join(ends)})" if ends else f"{mean} (one pair, no interval)"


def signed_of(contrast: Contrast, value: float) -> str:
    """A difference in what a contrast measures, with as many decimals as seeds leave of it."""
    return f"{value:+.{4 if contrast.unit.startswith(('nats per token', 'squared error')) else 3}f}"


def criterion(judged: Judged) -> str:
    """What confirms a contrast, in words."""
    contrast, text = judged.contrast, judged.contrast.criterion
    if text == "equal":
        text += (f" to {contrast.around:+.4g}" if contrast.around else "") + f" within {_margin(judged)}"
    return text


def _margin(judged: Judged) -> str:
    """With a digit more than rounding to a quarter of a gap would leave."""
    return "" if judged.margin is None else f"{judged.margin:.2g}"


def _prediction(old: Judged, pairs: int) -> float:
    """Half the interval in which 95 % of means over so many new pairs lie."""
    assert old.difference is not None
    values = list(old.difference.by_seed.values())
    return float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) * math.sqrt(1 / len(values) + 1 / pairs)
