"""docs/evidence.md: one row a claim, then each claim in full. The same records give the same bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import stdev

from ..report.data.formatting import number
from ..storage.files import write_whole
from .figure import render_figure
from .power import detectable
from .run_summary import MEASURES
from .text import interval, pairs
from .verdict import ClaimVerdict, Judged

__all__ = ["FIGURE", "render_page", "write_page"]

FIGURE = "evidence.svg"  # beside the page

HEAD = """\
# Evidence

Written by `make evidence` from the runs on record in [evidence/records](../evidence/records); do not edit. Each claim
is a file in [evidence](../evidence) whose criterion was written down before its runs. `equipoise reproduce NAME` trains
the runs of a claim again.

How to read it: two strategies start from the same weights and see the same data in the same order; their difference is
taken seed by seed, with a 95 % interval (Student's t). *lower*, *higher*: confirmed or refuted by a paired two-sided
t-test at 5 %; *equal*: confirmed by two one-sided tests within a margin, refuted where the interval lies outside it.
The primary claims share one error rate (Holm). Whatever is neither is undecided. Losses are nats per token of held-out
text: -0.01 is 1 % of perplexity.
"""
NOT_TESTED = """\
## What was not tested here

Models of billions of parameters, hundreds of billions of tokens, benchmarks of knowledge and reasoning, published
checkpoints. What a model of a hundred thousand parameters shows in two million tokens is the direction of an effect,
and its order of magnitude *there*.
"""


def render_page(judged: Sequence[ClaimVerdict]) -> str:
    """The page as Markdown."""
    rows = ["| claim | what it says | published | here | verdict |", "|---|---|---|---|---|"]
    for one in judged:
        claim = one.claim
        first = next((j for j in one.judged if j.contrast.criterion != "any"), one.judged[0])
        cells = [
            f"[{claim.name}](#{claim.name.lower()})",
            claim.title,
            claim.published,
            _short(first),
            one.verdict or "shown",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    words = Counter(one.verdict or "shown" for one in judged)
    hours = math.fsum(one.seconds for one in judged) / 3600
    counted = ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
    head = f"{HEAD}\n{len(judged)} claims: {counted}. {hours:.1f} core-hours, runs that claims share counted in each.\n"
    picture = f"![Differences in held-out loss with their intervals, claim by claim]({FIGURE})"
    return "\n".join([head, *rows, "", picture, "", _instrument(judged), *(_claim(one) for one in judged), NOT_TESTED])


def write_page(judged: Sequence[ClaimVerdict], path: Path) -> None:
    """The page, and its figure beside it. Raises OutputError where they cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, render_page(judged).encode())
    write_whole(path.with_name(FIGURE), render_figure(judged).encode())


def _instrument(judged: Sequence[ClaimVerdict]) -> str:
    """How much the difference in loss of two strategies varies between seeds, and what so many seeds can see."""
    lines = [
        "## The instrument",
        "",
        "How much the difference in held-out loss varies from seed to seed (sd), and the smallest mean difference that",
        "a paired test at 5 % tells from zero four times in five, with 3, 5 and 8 seeds; nats per token.",
        "",
        "| where | treated - baseline | pairs | sd | seen with 3 | 5 | 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    seen = set()
    for one in (j for of_claim in judged for j in of_claim.judged):
        contrast, difference = one.contrast, one.difference
        at = contrast.cell, contrast.treated, contrast.baseline
        if contrast.measure != "loss" or difference is None or difference.n < 3 or at in seen:
            continue
        seen.add(at)
        sd = stdev(difference.by_seed.values())
        sees = [f"{detectable(sd, pairs):.4f}" if sd > 0 else "" for pairs in (3, 5, 8)]
        cells = [contrast.cell, f"{contrast.treated} - {contrast.baseline}", str(difference.n), f"{sd:.4f}", *sees]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _claim(one: ClaimVerdict) -> str:
    claim = one.claim
    word = (one.verdict or "shown, not judged").capitalize()
    cost = f"{pairs(one)} pairs on record; {one.seconds / 3600:.1f} core-hours"
    lines = [
        f'<a id="{claim.name.lower()}"></a>',
        "",
        f"## {claim.name}: {claim.title}",
        "",
        claim.question.strip(),
        "",
        f"- Source: {claim.source}. Published: {claim.published}.",
        f"- **{word}**; family: {claim.family}; {cost}. `equipoise reproduce {claim.name}`",
        *([f"- Limits: {claim.limits}"] if claim.limits else []),
        "",
        "| where | treated - baseline | measure | criterion | treated | baseline | difference (95 %) | pairs | p | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(judged) for judged in one.judged),
        "",
    ]
    return "\n".join(lines)


def _row(judged: Judged) -> str:
    contrast = judged.contrast
    criterion = contrast.criterion
    if criterion == "equal":
        criterion += (f" to {contrast.around:+.4g}" if contrast.around else "") + f" within {number(judged.margin)}"
    count = str(judged.difference.n if judged.difference else 0)
    count += f", {judged.diverged} diverged" if judged.diverged else ""
    p = f"{judged.p:.2g}" if math.isfinite(judged.p) else ""
    sides = [number(side, 4) if math.isfinite(side) else "" for side in (judged.treated, judged.baseline)]
    unit = MEASURES[contrast.measure][0]
    pair = f"{contrast.treated} - {contrast.baseline}"
    cells = [contrast.cell, pair, f"{contrast.measure} ({unit})", criterion, *sides, interval(judged), count, p]
    cells.append(judged.verdict)
    return "| " + " | ".join(cells) + " |"


def _short(judged: Judged) -> str:
    text = interval(judged)
    return f"{text} {judged.contrast.measure}, n = {judged.difference.n}" if judged.difference else ""
