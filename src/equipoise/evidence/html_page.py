"""The HTML page on claims: one row a claim, then each in full. It has no script; equal records give equal bytes."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from ..lab.config.loading import from_dict
from ..lab.config.schema import RunConfig
from ..report.data.formatting import listed
from ..report.html.page import contents, document, stylesheet
from ..report.html.widgets import breakable, safe, section
from ..storage.files import atomic_write
from .breakdown import core_hours, distinct_runs, noise
from .html_claim import NOTHING, Drawn, badge, command, difference_cell, named_row, prose, render_claim, rows_table
from .page import INSTRUMENT, NOT_TESTED
from .pictures import extent, interval_picture, round_up, slug_of
from .power import PAIRS
from .verdict import ClaimVerdict

__all__ = ["render_html", "write_html"]

ORDER = ("confirmed", "refuted", "undecided", "in part", "not run", "")  # of verdicts; the last is "shown"
OVERVIEW = """\
A difference is treated − baseline, paired by seed, with its 95 % interval; where a claim has several, the first that is
judged stands for it. Every command goes on from what is on record."""
MARKS = (
    ('<path class="mean" d="M16 16h0"/>', "mean of the differences, treated − baseline"),
    ('<path class="interval" d="M0 16H32"/>', "its 95 % interval (Student's t)"),
    ('<path class="seeds" d="M16 16h0"/>', "one seed: both start from the same weights and see the same data"),
    ('<rect class="margin" width="32" height="32"/>', "margin within which two strategies count as equal"),
)
WORDS = (
    (("confirmed", "refuted"), """\
“Lower” and “higher” by a paired two-sided t-test at 5 %. “Equal” is confirmed by two one-sided tests within the margin
and refuted where the interval lies outside it. The primary claims share one error rate (Holm)."""),
    (("undecided",), "Neither: too few pairs, or too small an effect for them."),
    (("in part",), "Fewer pairs than were named before the runs. Not judged, so that nobody stops when it looks good."),
    (("",), "There is no criterion: numbers beside those that are judged."),
)  # fmt: skip
READING = """\
Losses are nats per token of held-out text: −0.01 is 1 % of perplexity. Curves are means over the seeds that both sides
have. The band of a curve holds all its seeds, that of a difference is its 95 % interval. Differences by domain have
single intervals, not corrected for their number. With <code>--records mine --again</code> a command trains all runs of
a claim from nothing and says which results lie outside what those on record predict."""


def write_html(judged: Sequence[ClaimVerdict], path: Path) -> None:
    """Raises OutputError where the file cannot be written."""
    atomic_write(path, render_html(judged).encode(), do="free disk space, or name another file with --html")


def render_html(judged: Sequence[ClaimVerdict]) -> str:
    """The page as text."""
    identities = _identities([one.claim.name for one in judged])
    drawn: Drawn = {}
    claims = "".join(render_claim(one, at, drawn) for one, at in zip(judged, identities, strict=True))
    body = "".join([
        section("All claims", OVERVIEW, _overview(judged, identities)),
        section("How to read it", "", _reading()),
        section("Each claim in full", "", claims),
        section("The instrument", INSTRUMENT, _instrument(judged)),
        section("What was not tested here", NOT_TESTED, ""),
    ])  # fmt: skip
    styles = stylesheet("base", "tables", "print") + _style()
    foot = "Made by <code>equipoise reproduce --html</code> from the runs on record. This file loads nothing."
    return document("claims about balancing", _head(judged) + contents(body) + "</header>\n" + body, foot, styles)


def _head(judged: Sequence[ClaimVerdict]) -> str:
    words = Counter(one.verdict for one in judged)
    counted = {word: str(words[word] or "none") for word in ORDER}
    title = (
        f"Of {_count(len(judged), 'claim')} about balancing, {counted['confirmed']} "
        f"{'is' if words['confirmed'] == 1 else 'are'} confirmed, {counted['refuted']} refuted and "
        f"{counted['undecided']} undecided."
    )
    rest = [
        f"{words[word]} {one if words[word] == 1 else more}"
        for word, one, more in (
            ("in part", "has only part of its runs", "have only part of their runs"),
            ("not run", "has none yet", "have none yet"),
            ("", "is shown without a verdict", "are shown without a verdict"),
        )
        if words[word]
    ]
    runs = distinct_runs(judged).values()
    config = from_dict(RunConfig, judged[0].claim.base)
    model, train = config.model, config.train
    tokens = train.micro_batches * train.sequences_per_micro_batch * config.data.sequence_length
    facts = [
        f"{_count(len(runs), 'run')} on record, {core_hours(judged):.1f} core-hours",
        f"{model.layers} layers of {model.experts} experts, top-{model.top_k}, width {model.width}",
        f"{train.steps} steps of {tokens:,} tokens, unless a claim says otherwise",
        *[f"torch {safe(version)}" for version in sorted({run.torch for run in runs if run.torch})],
    ]
    return f"""<header>
<p class="mark"><b>equipoise</b> &nbsp;what papers claim about balancing, trained again</p>
<h1>{title}</h1>
{f'<p class="quality">Of the others, {listed(rest)}.</p>' if rest else ""}
<p class="facts">{" · ".join(facts)}</p>
"""


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def _overview(judged: Sequence[ClaimVerdict], identities: Sequence[str]) -> str:
    """A row a claim, and a choice of which verdicts to show; it works by style sheet alone."""
    words = Counter(one.verdict for one in judged)
    choices = [("all", f"All {len(judged)}")]
    choices += [(slug_of(word), f"{badge(word)} {words[word]}") for word in ORDER if words[word]]
    picks = "".join(
        f'<label><input type="radio" name="verdict" value="{value}"{" checked" * (value == "all")}>{shown}</label>'
        for value, shown in choices
    )
    rows = [_row(one, identity) for one, identity in zip(judged, identities, strict=True)]
    heads = ("<Claim", "<Published", "<Difference here", "<Picture", "<Verdict")
    return (
        f'<fieldset class="picks"><legend class="unseen">Verdicts to show</legend>{picks}</fieldset>'
        f"{rows_table('overview', 'All claims', heads, rows)}"
    )


def _row(one: ClaimVerdict, identity: str) -> str:
    claim, leading = one.claim, one.leading
    here, picture = NOTHING, ""
    if leading is not None and leading.difference is not None:
        contrast = leading.contrast
        where = f" ({prose(contrast.cell)})" if len(one.judged) > 1 else ""
        here = f"{difference_cell(leading)}<small>{safe(contrast.measure)}, n = {leading.difference.n}{where}</small>"
        reach = round_up(extent(leading.difference, contrast.around, leading.margin))
        picture = interval_picture(leading, reach)
    counted = Counter(judged.verdict for judged in one.judged)
    parts = ", ".join(f"{counted[word]} {word or 'shown'}" for word in ORDER if counted[word])
    verdict = badge(one.verdict) + (f"<small>{parts}</small>" if len(one.judged) > 1 else "")
    head = (
        f'<a href="#{identity}"><b>{breakable(claim.name)}</b> {prose(claim.title)}</a>'
        f"<small><code>{safe(command(claim.name))}</code></small>"
    )
    cells = [("Published", prose(claim.published)), ("Difference", here), ("Picture", picture), ("Verdict", verdict)]
    return named_row(head, [(name, shown, "left") for name, shown in cells], slug_of(one.verdict))


def _reading() -> str:
    """A picture with its parts named, and the words."""
    marks = "".join(f'<li><svg class="pic" viewBox="0 0 32 32">{mark}</svg>{text}</li>' for mark, text in MARKS)
    told = "".join(f"<dt>{''.join(map(badge, words))}</dt><dd>{text}</dd>" for words, text in WORDS)
    return f'<div class="reading"><ul>{marks}</ul><dl>{told}</dl></div><p class="lead">{READING}</p>'


def _instrument(judged: Sequence[ClaimVerdict]) -> str:
    kinds = ("half", "other half")
    rows = [
        named_row(prose(one.where), [
            ("Contrast", breakable(one.pair).replace(" - ", " − "), "left"),
            ("Pairs", str(one.pairs), kinds[0]),
            ("sd", f"{one.sd:.4f}", kinds[1]),
            *((f"Seen with {pairs}", f"{sees:.4f}" if math.isfinite(sees) else "", kinds[place % 2])
              for place, (pairs, sees) in enumerate(zip(PAIRS, one.sees, strict=True))),
        ])
        for one in noise(judged)
    ]  # fmt: skip
    heads = ["<Where", "<Contrast", "Pairs", "sd", *(f"Seen with {pairs}" for pairs in PAIRS)]
    return rows_table("instrument", "The instrument", heads, rows) if rows else ""


def _identities(names: Sequence[str]) -> list[str]:
    """Anchors, each its own whatever the names are."""
    found: list[str] = []
    for name in names:
        plain = "claim-" + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "x")
        same = sum(one == plain or one.startswith(f"{plain}--") for one in found)
        found.append(f"{plain}--{same + 1}" if same else plain)
    return found


def _style() -> str:
    return (resources.files("equipoise.evidence") / "claims.css").read_text(encoding="utf-8")
