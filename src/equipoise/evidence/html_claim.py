"""One claim in full as HTML: what was asked, every contrast with its numbers, and what lies behind each difference."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence

from ..report.data.formatting import number
from ..report.html.widgets import breakable, minus, safe
from .breakdown import by_domain, over_steps
from .claim import Contrast
from .law import HEADS, cells_of, fit_laws, law_rows, law_words
from .pictures import curves_picture, domains_picture, extent, interval_picture, round_up, slug_of
from .run_summary import MEASURES
from .text import criterion, interval, pairs
from .verdict import ClaimVerdict, Judged

__all__ = ["NOTHING", "Drawn", "badge", "command", "difference_cell", "named_row", "prose", "render_claim",
           "rows_table"]  # fmt: skip

TABLE = "all-claims"  # the section that a claim leads back to
NOTHING = '<span class="none">no pair yet</span>'
SIDES = ("baseline", "treated")  # the order in which they are drawn

Drawn = dict[frozenset[tuple[str, str, int, str]], str]  # side, key, seed, text of each run -> link to its pictures


def render_claim(one: ClaimVerdict, identity: str, drawn: Drawn) -> str:
    """An article whose heading has this identity; ``drawn`` is the page's and grows by what the claim draws."""
    claim = one.claim
    told = (("Source", claim.source), ("Published", claim.published), ("Limits", claim.limits))
    facts = "".join(f"<dt>{name}</dt><dd>{prose(text)}</dd>" for name, text in told if text.strip())
    cost = f"{pairs(one).replace('/', ' of ')} pairs on record · {one.seconds / 3600:.1f} core-hours"
    return f"""<article class="claim" aria-labelledby="{identity}">
<h3 id="{identity}" tabindex="-1"><b>{breakable(claim.name)}</b> {prose(claim.title)}</h3>
<p class="about">{badge(one.verdict)} {safe(claim.family)} · {cost} · <code>{safe(command(claim.name))}</code></p>
<p class="question">{prose(claim.question)}</p>
<dl class="told">{facts}</dl>
{_contrasts(one)}
{_law(one)}{_behind(one, identity, drawn)}<p class="back"><a href="#{TABLE}">To the table of all claims</a></p>
</article>
"""


def badge(verdict: str) -> str:
    """The word, with a mark whose shape says the same: nothing rests on colour alone."""
    return f'<span class="verdict {slug_of(verdict)}">{safe(verdict or "shown")}</span>'


def command(name: str) -> str:
    """What trains the missing runs of a claim and judges it, for a shell."""
    return f"equipoise reproduce {shlex.quote(name)}"


def prose(text: str) -> str:
    """A claim's own words: lines joined, `names` as code, and nothing else of it markup."""
    return minus(re.sub(r"`([^`]+)`", r"<code>\1</code>", safe(" ".join(text.split()))))


def difference_cell(judged: Judged) -> str:
    """The mean difference, and below it its interval or why it has none."""
    if judged.difference is None:
        return NOTHING
    mean, _, ends = interval(judged).partition(" ")
    below = ends.strip("()") or "one pair, no interval"
    return f'<span class="value">{minus(mean)}</span><small>{minus(below)}</small>'


def named_row(head: str, cells: Sequence[tuple[str, str, str]], kind: str = "") -> str:
    """A row of a table that a phone shows as a card: (name that stands before the value, HTML, CSS class)."""
    made = "".join(
        f'<td class="{of_cell if shown else f"{of_cell} none"}" data-of="{name}">{shown or "–"}</td>'
        for name, shown, of_cell in cells
    )
    return f'<tr class="{kind}"><th scope="row">{head}</th>{made}</tr>'


def rows_table(kind: str, label: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    """A table of `named_row` rows; heads of columns that are not numbers begin with "<"."""
    head = "".join(
        f'<th scope="col"{" class=left" if one.startswith("<") else ""}>{one.removeprefix("<")}</th>' for one in heads
    )
    return (
        f'<div class="scroll"><table class="rows {kind}" aria-label="{safe(label)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _contrasts(one: ClaimVerdict) -> str:
    heads = ("<Where", "<Measure", "Treated", "Baseline", "Difference (95 %)", "<Picture", "Pairs", "p", "<Verdict")
    reach = {name: _reach(one, name) for name in {judged.contrast.measure for judged in one.judged}}
    rows = [_row(judged, reach[judged.contrast.measure]) for judged in one.judged]
    return rows_table("contrasts", f"Contrasts of {one.claim.name}", heads, rows)


def _law(one: ClaimVerdict) -> str:
    """What laws are worth, of a claim that states the diversity of its cells."""
    cells = cells_of(one)
    if not (fits := fit_laws(cells)):
        return ""
    rows = [
        named_row(safe(name), [(head, minus(safe(cell)), "half") for head, cell in zip(HEADS[1:], others, strict=True)])
        for name, *others in law_rows(fits)
    ]
    table = rows_table("laws", f"Laws of {one.claim.name}", [f"<{HEADS[0]}", *HEADS[1:]], rows)
    return f"<p>{minus(safe(law_words(one, cells, fits)))}</p>\n{table}\n"


def _reach(one: ClaimVerdict, measure: str) -> float:
    """One axis for all contrasts of a measure."""
    known = [judged for judged in one.judged if judged.contrast.measure == measure and judged.difference]
    return round_up(max((extent(j.difference, j.contrast.around, j.margin) for j in known), default=0.0))


def _row(judged: Judged, reach: float) -> str:
    contrast = judged.contrast
    sides = [minus(number(side, 4)) if math.isfinite(side) else "" for side in (judged.treated, judged.baseline)]
    count = f"{judged.difference.n if judged.difference else 0} of {contrast.seeds}"
    count += f"<small>{judged.diverged} diverged</small>" if judged.diverged else ""
    wanted = "no criterion" if contrast.criterion == "any" else f"criterion: {minus(safe(criterion(judged)))}"
    return named_row(
        f"{prose(contrast.cell)}<small>{_sides(contrast)}</small>{_settings(contrast)}",
        [
            ("Measure", f"{safe(contrast.measure)}<small>{safe(MEASURES[contrast.measure][0])}</small>", "left"),
            ("Treated", sides[0], "half"),
            ("Baseline", sides[1], "other half"),
            ("Difference", difference_cell(judged), ""),
            ("Picture", interval_picture(judged, reach), "left drawn"),
            ("Pairs", count, "half"),
            ("p", f"{judged.p:.2g}" if math.isfinite(judged.p) else "", "other half"),
            ("Verdict", f"{badge(judged.verdict)}<small>{wanted}</small>", "left"),
        ],
    )


def _sides(contrast: Contrast) -> str:
    return f"{breakable(contrast.treated)} − {breakable(contrast.baseline)}"


def _settings(contrast: Contrast) -> str:
    told = [
        f"{whose}{name} = {', '.join(map(str, value)) if isinstance(value, list) else value}"
        for whose, settings in (("", contrast.settings), ("baseline: ", contrast.baseline_settings))
        for name, value in settings.items()
    ]
    return "".join(f"<small><code>{safe(text)}</code></small>" for text in told)


def _behind(one: ClaimVerdict, identity: str, drawn: Drawn) -> str:
    """What lies behind each contrast; where the same runs were drawn before, the way there."""
    found, elsewhere = [], []
    for judged in one.judged:
        contrast = judged.contrast
        runs = frozenset((side, run.key, run.seed, run.corpus) for side in SIDES for run in judged.runs[side].values())
        where = prose(contrast.cell)
        if runs in drawn:
            if not drawn[runs].startswith(f'<a href="#{identity}"'):
                elsewhere.append(f"{where} at {drawn[runs]}")
        elif pictures := _pictures(judged):
            key = "".join(f'<span class="key {side}">{breakable(getattr(contrast, side))}, {side}</span>'
                          for side in SIDES[::-1])  # fmt: skip
            found.append(
                f"<details{'' if found else ' open'}><summary>{where}: {_sides(contrast)}, over the steps and by domain"
                f'</summary><p class="keys">{key}</p><div class="charts">{pictures}</div></details>\n'
            )
            drawn[runs] = f'<a href="#{identity}">{safe(one.claim.name)}, {where}</a>'
    if elsewhere:
        found.append(f'<p class="back">The same runs are drawn elsewhere: {"; ".join(elsewhere)}.</p>\n')
    return "".join(found)


def _pictures(judged: Judged) -> str:
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
         domains_picture(domains) if len(domains) > 1 else ""),
    ]  # fmt: skip
    return "".join(
        f"<figure><figcaption>{title} <small>{unit}</small></figcaption>{picture}</figure>"
        for title, unit, picture in made
        if picture
    )
