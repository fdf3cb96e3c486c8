"""docs/evidence.md: one row a claim, then each claim in full. The same records give the same bytes."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch

from ..lab.config.loading import from_dict
from ..lab.config.schema import RunConfig
from ..lab.models.transformer import Decoder
from ..report.data.formatting import number
from ..report.data.statistics import Difference
from ..storage.files import atomic_write
from .breakdown import by_domain, core_hours, noise
from .claim import Claim
from .figure import render_figure
from .law import HEADS, cells_of, fit_laws, law_rows, law_words
from .text import criterion, interval, pairs
from .verdict import CONFIRMED, REFUTED, UNDECIDED, ClaimVerdict, Judged

__all__ = ["FIGURE", "figures", "render_page", "write_page"]

FIGURE = "evidence.svg"  # beside the page
IN_SHORT = {"idea.svg": ("E01", "C05", "C06")}  # for docs/idea.md: the scope in every cell, tuned, by the defaults
ELSEWHERE = "free disk space, or name another file with --page"

HEAD = """\
# Evidence

<!-- written by `make evidence`: edit evidence/*.toml, or src/equipoise/evidence/page.py -->
Each claim is a file in [evidence](../evidence) whose criterion was written down before its runs, which are
[on record](../evidence/records). `equipoise reproduce NAME` trains the runs of a claim again. `make evidence` writes
this page from the records, and `runs/evidence.html`: the same with a picture of every difference, its way over the
steps and each domain.

[A note](../lab-notes/2026-11-30-verdicts.md) says in words what they decide, what goes against the papers or against
us, and what so small an instrument cannot decide.

{trained}

How to read it: two strategies start from the same weights and see the same data in the same order; their difference is
taken seed by seed, with a 95 % interval (Student's t). *lower*, *higher*: **confirmed** or **refuted** by a paired
two-sided t-test at 5 %; *equal*: confirmed by two one-sided tests within a margin, refuted where the interval lies
outside it. Whatever is neither is **undecided**. *any* has no criterion and is **shown**. A contrast with fewer pairs
(seeds that both sides have) than were named before the runs is **unfinished**, and not judged. Of a primary claim p is
Holm's, over all contrasts of the primary claims, so an interval, which is that of a difference by itself, may leave out
zero and the word be undecided; the other claims' p are each by itself. "The gap" is the difference between `micro` and
`global` in the same cell. Losses are nats per token of held-out text: -0.01 is 1 % of perplexity. Where what is
compared is no training of the lab, its two sides are cases of an experiment, paired by seed in the same way.

A claim is **refuted** if one of its contrasts is, else **undecided** if one is, and **confirmed** only if all are.
*here* is the first contrast that has the claim's verdict; beside the verdict is how many of the contrasts are
confirmed.

## What was not tested here

{not_tested}

## Claims
"""
TRAINED = """\
What is trained, unless a claim says otherwise: a model of {layers} layers of width {width} with {experts} experts of
width {hidden}, top-{top_k} ({parameters:.1f} million parameters), for {steps} steps of {sequences} sequences of
{length} tokens of the text that a Python installation holds, in several domains. A micro-batch is {together} of one
domain, over which `micro` takes f: its Balance BSZ. *std* is that of the initial weights. Balance losses have the
coefficient 0.02, and `global` the estimator `exact`; the library's defaults are 1e-2 and `filled` ([C06](#c06))."""
INSTRUMENT = """\
How much the difference in held-out loss varies from seed to seed (sd), and the smallest mean difference that
a paired test at 5 % tells from zero four times in five, with 3, 5 and 8 seeds; nats per token."""
NOT_TESTED = """\
Models of billions of parameters, hundreds of billions of tokens, benchmarks of knowledge and reasoning, published
checkpoints, fine-tuning. What a model of half a million parameters shows in two million tokens is the direction of an
effect, and its order of magnitude at that size."""

FAMILY = {
    "primary": "**Primary**, with one error rate among them:",
    "secondary": "**Secondary**, each by itself:",
    "control": "**Controls**:",
}


def render_page(judged: Sequence[ClaimVerdict]) -> str:
    """The page as Markdown."""
    rows, family = [], ""
    for one in judged:
        claim = one.claim
        if claim.family != family:
            family = claim.family
            rows += [
                "",
                FAMILY[family],
                "",
                "| claim | verdict | what it says | here | published |",
                "|---|---|---|---|---|",
            ]
        cells = [
            f"[{claim.name}](#{claim.name.lower()})",
            _verdict(one),
            claim.title,
            _short(one),
            " ".join(claim.published.split()),  # in a file it may take several lines, in a table one
        ]
        rows.append("| " + " | ".join(cells) + " |")
    words = Counter(one.verdict or "shown" for one in judged)
    counted = ", ".join(f"{count} {word}" for word, count in sorted(words.items()))
    head = HEAD.format(trained=_trained(judged[0].claim), not_tested=NOT_TESTED)
    head = f"{head}\n{len(judged)} claims: {counted}. {core_hours(judged):.1f} core-hours on record.\n"
    picture = f"![Differences in held-out loss with their intervals, claim by claim]({FIGURE})"
    in_full = map(_claim, judged)
    return "\n".join([head, *rows[1:], "", picture, "", _instrument(judged), *in_full])


def _trained(claim: Claim) -> str:
    """The base of all claims, in words."""
    config = from_dict(RunConfig, claim.base)
    model, train = config.model, config.train
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Decoder(model).parameters()) + model.vocab_size * model.width
    each = train.sequences_per_micro_batch
    text = TRAINED.format(
        layers=model.layers, width=model.width, experts=model.experts, hidden=model.expert_hidden, top_k=model.top_k,
        parameters=parameters / 1e6, steps=train.steps, sequences=each * train.micro_batches,
        length=config.data.sequence_length, together="one sequence" if each == 1 else f"{each} sequences",
    )  # fmt: skip
    return textwrap.fill(text, 120)


def write_page(judged: Sequence[ClaimVerdict], path: Path) -> None:
    """The page, and its figures beside it. Raises OutputError where they cannot be written."""
    atomic_write(path, render_page(judged).encode(), do=ELSEWHERE)
    for name, chosen in figures(judged).items():
        atomic_write(path.with_name(name), render_figure(chosen).encode(), do=ELSEWHERE)


def figures(judged: Sequence[ClaimVerdict]) -> dict[str, Sequence[ClaimVerdict]]:
    """The claims of each figure; one in short has those of its claims that there are."""
    short = {name: [one for one in judged if one.claim.name in claims] for name, claims in IN_SHORT.items()}
    return {FIGURE: judged} | {name: chosen for name, chosen in short.items() if chosen}


def _instrument(judged: Sequence[ClaimVerdict]) -> str:
    lines = [
        "## The instrument",
        "",
        INSTRUMENT,
        "",
        "| where | treated - baseline | pairs | sd | seen with 3 | 5 | 8 |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in noise(judged):
        sees = [f"{value:.4f}" if math.isfinite(value) else "" for value in one.sees]
        lines.append("| " + " | ".join([one.where, one.pair, str(one.pairs), f"{one.sd:.4f}", *sees]) + " |")
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
        f"- Source: {claim.source}. Published: {' '.join(claim.published.split())}.",
        f"- **{word}**; family: {claim.family}; {cost}. `equipoise reproduce {claim.name}`",
        *([f"- Limits: {claim.limits}"] if claim.limits else []),
        "",
        "| where | treated - baseline | measure | criterion | treated | baseline | difference (95 %) | pairs | p | |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_row(judged) for judged in one.judged),
        "",
        *_law(one),
        *_domains(one),
    ]
    return "\n".join(lines)


def _law(one: ClaimVerdict) -> list[str]:
    """What laws are worth, of a claim that states the diversity of its cells."""
    cells = cells_of(one)
    if not (fits := fit_laws(cells)):
        return []
    rows = ["| " + " | ".join(row) + " |" for row in [list(HEADS), ["---"] * len(HEADS), *law_rows(fits)]]
    return [law_words(one, cells, fits), "", *rows, ""]


def _domains(one: ClaimVerdict) -> list[str]:
    """Where the difference in loss lies, of a claim that is about loss."""
    of_loss = [judged for judged in one.judged if judged.contrast.measure == "loss"]
    found = [(judged.contrast, domains) for judged in of_loss if len(domains := by_domain(judged)) > 1]
    if not found or one.judged[0].contrast.measure != "loss":
        return []
    names = list(dict.fromkeys(name for _, domains in found for name in domains))
    lines = [
        "By domain, the difference in held-out loss and half its 95 % interval; shown, not judged:",
        "",
        "| where | treated - baseline | " + " | ".join(names) + " |",
        "|---" * (2 + len(names)) + "|",
    ]
    for contrast, domains in found:
        cells = [_half_width(domains[name]) if name in domains else "" for name in names]
        lines.append("| " + " | ".join([contrast.cell, f"{contrast.treated} - {contrast.baseline}", *cells]) + " |")
    return [*lines, ""]


def _half_width(difference: Difference) -> str:
    half = "" if difference.high is None else f" ± {difference.high - difference.mean:.3f}"
    return f"{difference.mean:+.3f}{half}"


def _row(judged: Judged) -> str:
    contrast = judged.contrast
    count = str(judged.difference.n if judged.difference else 0)
    count += f", {judged.diverged} diverged" if judged.diverged else ""
    p = f"{judged.p:.2g}" if math.isfinite(judged.p) else ""
    sides = [number(side, 4) if math.isfinite(side) else "" for side in (judged.treated, judged.baseline)]
    unit = contrast.unit
    pair = f"{contrast.treated} - {contrast.baseline}"
    cells = [
        contrast.cell,
        pair,
        f"{contrast.measured} ({unit})",
        criterion(judged),
        *sides,
        interval(judged),
        count,
        p,
    ]
    cells.append(judged.verdict)
    return "| " + " | ".join(cells) + " |"


def _verdict(one: ClaimVerdict) -> str:
    """The word, and how many of several contrasts are confirmed."""
    words = [judged.verdict for judged in one.judged if judged.contrast.criterion != "any"]
    several = len(words) > 1 and one.verdict in (REFUTED, UNDECIDED)
    return (one.verdict or "shown") + (f" ({words.count(CONFIRMED)} of {len(words)} confirmed)" if several else "")


def _short(one: ClaimVerdict) -> str:
    leading = one.leading
    if leading is None or leading.difference is None:
        return ""
    of, where = leading.contrast, ""
    if len(one.judged) > 1:
        alike = sum((other.contrast.cell, other.contrast.measured) == (of.cell, of.measured) for other in one.judged)
        where = f" ({f'{of.treated} - {of.baseline}, ' if alike > 1 else ''}{of.cell})"
    return f"{interval(leading)} {of.measured}, n = {leading.difference.n}{where}"
