"""The HTML page on claims: one row a claim, then each in full. It has no script; equal records give equal bytes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..lab.config.loading import from_dict
from ..lab.config.schema import RunConfig
from ..report.data.formatting import listed, plural
from ..report.html.pictures import round_up
from ..report.html.rendering import render, slug
from ..report.html.widgets import Part, Section
from ..storage.files import atomic_write
from .breakdown import core_hours, distinct_runs, noise
from .html_claim import Drawn, claim_part, command, difference_of
from .page import INSTRUMENT, NOT_TESTED
from .pictures import extent, interval_picture
from .power import PAIRS
from .verdict import ClaimVerdict

__all__ = ["render_html", "write_html"]

ORDER = ("confirmed", "refuted", "undecided", "unfinished", "not run", "")  # of verdicts; the last is "shown"
OVERVIEW = """\
A difference is treated − baseline, paired by seed, with its 95 % interval; where a claim has several, the first that is
judged stands for it. Every command goes on from what is on record."""


def write_html(judged: Sequence[ClaimVerdict], path: Path) -> None:
    """Raises OutputError where the file cannot be written, ConfigError where jinja2 is missing."""
    atomic_write(path, render_html(judged).encode(), do="free disk space, or name another file with --html")


def render_html(judged: Sequence[ClaimVerdict]) -> str:
    """The page as text."""
    identities = _identities([one.claim.name for one in judged])
    drawn: Drawn = {}
    sections = [
        Section("All claims", OVERVIEW, [_overview(judged, identities)]),
        Section("How to read it", "", [("reading", {})]),
        Section("Each claim in full", "", [claim_part(*pair, drawn) for pair in zip(judged, identities, strict=True)]),
        Section("The instrument", INSTRUMENT, _instrument(judged)),
        Section("What was not tested here", NOT_TESTED),
    ]
    return render(
        "claims.html.jinja", "equipoise.evidence", title="claims about balancing", sections=sections,
        styles=("base", "tables", "print", "pictures", "claims"), **_head(judged),
    )  # fmt: skip


def _head(judged: Sequence[ClaimVerdict]) -> dict[str, Any]:
    """What stands above the sections."""
    words = Counter(one.verdict for one in judged)
    counted = {word: str(words[word] or "none") for word in ORDER}
    headline = (
        f"Of {plural(len(judged), 'claim')} about balancing, {counted['confirmed']} "
        f"{'is' if words['confirmed'] == 1 else 'are'} confirmed, {counted['refuted']} refuted and "
        f"{counted['undecided']} undecided."
    )
    rest = [
        f"{words[word]} {one if words[word] == 1 else more}"
        for word, one, more in (
            ("unfinished", "has only part of its runs", "have only part of their runs"),
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
        f"{plural(len(runs), 'run')} on record, {core_hours(judged):.1f} core-hours",
        f"{model.layers} layers of {model.experts} experts, top-{model.top_k}, width {model.width}",
        f"{train.steps} steps of {tokens:,} tokens, unless a claim says otherwise",
        *[f"torch {version}" for version in sorted({run.torch for run in runs if run.torch})],
    ]
    return {"headline": headline, "quality": f"Of the others, {listed(rest)}." if rest else "", "facts": facts}


def _overview(judged: Sequence[ClaimVerdict], identities: Sequence[str]) -> Part:
    """A row a claim, and a choice of which verdicts to show; it works by style sheet alone."""
    words = Counter(one.verdict for one in judged)
    rows = [_row(one, identity) for one, identity in zip(judged, identities, strict=True)]
    return "overview", {"words": [(word or "shown", words[word]) for word in ORDER if words[word]], "rows": rows}


def _row(one: ClaimVerdict, identity: str) -> dict[str, Any]:
    leading, several = one.leading, len(one.judged) > 1
    row = {"claim": one.claim, "identity": identity, "command": command(one.claim.name),
           "verdict": one.verdict or "shown", "difference": None, "picture": None, "parts": ""}  # fmt: skip
    if leading is not None and leading.difference is not None:
        contrast = leading.contrast
        reach = round_up(extent(leading.difference, contrast.around, leading.margin))
        row |= {"difference": difference_of(leading), "about": f"{contrast.measured}, n = {leading.difference.n}",
                "cell": contrast.cell if several else "", "picture": interval_picture(leading, reach)}  # fmt: skip
    if several:
        counted = Counter(judged.verdict for judged in one.judged)
        row["parts"] = ", ".join(f"{counted[word]} {word or 'shown'}" for word in ORDER if counted[word])
    return row


def _instrument(judged: Sequence[ClaimVerdict]) -> list[Part]:
    rows = [
        {"where": one.where, "pair": one.pair, "pairs": one.pairs, "sd": f"{one.sd:.4f}",
         "sees": [f"{sees:.4f}" if math.isfinite(sees) else "" for sees in one.sees]}
        for one in noise(judged)
    ]  # fmt: skip
    seen = [f"Seen with {pairs}" for pairs in PAIRS]
    return [("instrument", {"rows": rows, "seen": seen})] if rows else []


def _identities(names: Sequence[str]) -> list[str]:
    """Anchors, each its own whatever the names are."""
    found: list[str] = []
    for name in names:
        plain = f"claim-{slug(name) or 'x'}"
        same = sum(one == plain or one.startswith(f"{plain}--") for one in found)
        found.append(f"{plain}--{same + 1}" if same else plain)
    return found
