"""One claim in full: what was asked, every contrast with its numbers, and what lies behind each difference."""

from __future__ import annotations

import math
import shlex
from typing import Any, NamedTuple

from ..report.data.formatting import number
from ..report.html.pictures import Picture, round_up
from ..report.html.widgets import Part
from .breakdown import by_domain, over_steps
from .claim import Contrast
from .law import HEADS, cells_of, fit_laws, law_rows, law_words
from .pictures import curves_picture, domains_picture, extent, interval_picture
from .text import criterion, interval, pairs
from .verdict import ClaimVerdict, Judged

__all__ = ["Drawn", "claim_part", "command", "difference_of"]

SIDES = ("baseline", "treated")  # the order in which they are drawn


class Place(NamedTuple):
    """Where on the page the pictures of some runs are: a claim's anchor and name, the cell of its contrast."""

    identity: str
    name: str
    cell: str


Drawn = dict[frozenset[tuple[str, str, int, str]], Place]  # side, key, seed, text of each run


def claim_part(one: ClaimVerdict, identity: str, drawn: Drawn) -> Part:
    """An article whose heading has this identity; ``drawn`` is the page's and grows by what the claim draws."""
    measures = {judged.contrast.measure for judged in one.judged}
    reach = {name: _reach(one, name) for name in measures}
    folds, elsewhere = _behind(one, identity, drawn)
    return "claim", {
        "claim": one.claim, "identity": identity, "verdict": one.verdict or "shown", "command": command(one.claim.name),
        "cost": f"{pairs(one).replace('/', ' of ')} pairs on record · {one.seconds / 3600:.1f} core-hours",
        "rows": [_row(judged, reach[judged.contrast.measure]) for judged in one.judged], "law": _law(one),
        "folds": folds, "elsewhere": elsewhere,
    }  # fmt: skip


def command(name: str) -> str:
    """What trains the missing runs of a claim and judges it, for a shell."""
    return f"equipoise reproduce {shlex.quote(name)}"


def difference_of(judged: Judged) -> tuple[str, str] | None:
    """The mean difference, and its interval or why it has none."""
    if judged.difference is None:
        return None
    mean, _, ends = interval(judged).partition(" ")
    return mean, ends.strip("()")


def _law(one: ClaimVerdict) -> dict[str, Any]:
    """What laws are worth, of a claim that states the diversity of its cells."""
    cells = cells_of(one)
    fits = fit_laws(cells)
    return {"words": law_words(one, cells, fits), "heads": HEADS, "rows": law_rows(fits)} if fits else {}


def _reach(one: ClaimVerdict, measure: str) -> float:
    """One axis for all contrasts of a measure."""
    known = [judged for judged in one.judged if judged.contrast.measure == measure and judged.difference]
    return round_up(max((extent(j.difference, j.contrast.around, j.margin) for j in known), default=0.0))


def _row(judged: Judged, reach: float) -> dict[str, Any]:
    contrast = judged.contrast
    sides = {side: number(value, 4) if math.isfinite(value := getattr(judged, side)) else "" for side in SIDES}
    return sides | {
        "contrast": contrast, "settings": _settings(contrast), "unit": contrast.unit,
        "difference": difference_of(judged), "picture": interval_picture(judged, reach),
        "pairs": f"{judged.difference.n if judged.difference else 0} of {contrast.seeds}", "diverged": judged.diverged,
        "p": f"{judged.p:.2g}" if math.isfinite(judged.p) else "", "verdict": judged.verdict or "shown",
        "wanted": "no criterion" if contrast.criterion == "any" else f"criterion: {criterion(judged)}",
    }  # fmt: skip


def _settings(contrast: Contrast) -> list[str]:
    return [
        f"{whose}{name} = {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for whose, settings in (("", contrast.settings), ("baseline: ", contrast.baseline_settings))
        for name, value in settings.items()
    ]


def _behind(one: ClaimVerdict, identity: str, drawn: Drawn) -> tuple[list[dict[str, Any]], list[tuple[str, Place]]]:
    """What lies behind each contrast; where the same runs were drawn before, the way there."""
    found, elsewhere = [], []
    for judged in one.judged:
        contrast = judged.contrast
        runs = frozenset((side, run.key, run.seed, run.corpus) for side in SIDES for run in judged.runs[side].values())
        if runs in drawn:
            if drawn[runs].identity != identity:
                elsewhere.append((contrast.cell, drawn[runs]))
        elif pictures := _pictures(judged):
            found.append({"contrast": contrast, "pictures": pictures})
            drawn[runs] = Place(identity, one.claim.name, contrast.cell)
    return found, elsewhere


def _pictures(judged: Judged) -> list[tuple[str, str, Picture]]:
    """Those that there are, each with a title and a unit."""
    steps, domains = over_steps(judged), by_domain(judged)
    names = {side: getattr(judged.contrast, side) for side in SIDES}
    ends = {
        what: "; ".join(f"{names[side]} ends at {number(curve.mean[-1], 4)}" for side in SIDES if (curve := of[side]))
        for what, of in (("loss", steps.loss), ("maxvio", steps.maxvio))
    }
    last = f"{steps.difference.mean[-1]:+.4f} at the end" if steps.difference else ""
    made = [
        ("Held-out loss", "nats per token",
         curves_picture([(side, steps.loss[side]) for side in SIDES], f"Held-out loss: {ends['loss']}")),
        ("Difference in held-out loss", "95 % interval",
         curves_picture([("treated", steps.difference)], f"Difference in held-out loss: {last}", zero=True)),
        ("MaxVio in training", "global batch",
         curves_picture([(side, steps.maxvio[side]) for side in SIDES], f"MaxVio in training: {ends['maxvio']}")),
        ("Difference by domain", "nats per token, shown, not judged",
         domains_picture(domains) if len(domains) > 1 else None),
    ]  # fmt: skip
    return [(title, unit, picture) for title, unit, picture in made if picture]
