"""A diagnosis as plain text of at most 80 columns, and as JSON: the answer, why, and what to write."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from ..report.data.formatting import clean
from ..report.text.table import rule, wrap
from .diagnosis import ASKED, SEVERITIES, Batch, Diagnosis, Finding, Loss
from .remedies import as_settings, policies

__all__ = ["headline", "render", "to_json"]

MARKS = {"off": "OFF", "refused": "REFUSED", "differs": "DIFFERS", "note": "note"}
SCOPES = {"sequence": "each sequence", "micro_batch": "each rank's micro-batch", "global_batch": "the whole step"}
INDENT = " " * 12
OWN = "All below is the engine's own balancing, as it is without equipoise."


def render(case: Diagnosis, *, expert_parallel: int | None = None) -> str:
    """The diagnosis as text."""
    title = wrap(clean(f"{case.engine} {case.version}: {case.model.in_words or 'a model that is not known here'}"))
    found = sorted(case.findings, key=lambda one: SEVERITIES.index(one.severity))
    blocks = [
        f"{title}\n{rule(max(map(len, title.splitlines())))}",
        "\n".join(wrap(line) for line in headline(case)),
        "\n".join(_facts(case, expert_parallel)),
        "\n".join(map(_finding, found)),
        "\n\n".join(_advice(case)),
        wrap(clean(f"known from: {'; '.join(case.known_from)}"), "  ") if case.known_from else "",
        "say, for an answer in numbers:\n" + "\n".join(f"  {ASKED[one]}" for one in case.asked) if case.asked else "",
    ]
    return "\n\n".join(block for block in blocks if block) + "\n"


def headline(case: Diagnosis) -> Iterator[str]:
    """The answer in a sentence or two."""
    if case.found("refused"):
        yield f"It will not start, or not train as written: {case.found('refused')[0].what}."
        return
    if case.ours:
        yield f"equipoise balances: {clean(', '.join(case.ours))}. {OWN}"
        return
    if case.ours is not None:
        yield "equipoise measures, and changes nothing."
    if not case.balances:
        yield "Nothing balances the experts."
    for loss in case.losses:
        if loss.works:
            whole = f", of {case.batch.whole} in a step" if case.batch.whole else ""
            yield f"A loss balances {SCOPES[loss.scope]}: your Balance BSZ is {_bsz(case, loss)}{whole}."
        else:
            yield f"A loss of coefficient {loss.coef:g} is declared, and does nothing."
    if case.bias_moves and case.bias is not None:
        whole = f"{case.batch.whole} {case.batch.unit}" if case.batch.whole else "all its sequences"
        yield f"A bias balances the whole step, {whole}: it moves by {case.bias.rate:g} a step."
    if case.other:
        yield f"{case.other.capitalize()} balances, with no loss."


def to_json(case: Diagnosis) -> dict[str, Any]:
    """Everything as plain values; each loss with its coefficient in our unit (``ours``) and its Balance BSZ."""
    found = asdict(case)
    for loss, made in zip(case.losses, found["losses"], strict=True):
        made |= {"ours": loss.real(case.model), "balance_bsz": loss.sequences(case.batch)}
    return found | {
        "balances": case.balances,
        "headline": list(headline(case)),
        "fix": case.fix,
        "policies": [asdict(one) | {"written": one.at(case.host)} for one in policies(case)],
        "asked": case.asked,
    }


def _bsz(case: Diagnosis, loss: Loss) -> str:
    known, batch = loss.sequences(case.batch), case.batch
    if loss.scope == "micro_batch":
        return str(known) if known else "that micro-batch, of unknown size"
    if loss.prefix and known and batch.micro_batch and batch.ranks and batch.accumulation != 1:
        return f"{batch.micro_batch * batch.ranks} at a step's first micro-batch, {known} at its last"
    return str(known) if known else "ranks times the micro-batches so far"


def _facts(case: Diagnosis, expert_parallel: int | None) -> Iterator[str]:
    for loss in case.losses:
        real, words = loss.real(case.model), loss.in_words(case.model)
        known = f"as strong as coef {real:.3g} in our unit" if real is not None else "in our unit"
        ours = known if loss.convention else "no factor makes it ours"
        once = "" if loss.works else "off; once on: "
        yield wrap(f"  loss      {once}{loss.scope}, coefficient {words}: {ours}", INDENT)
    if not case.losses:
        yield f"  loss      none{f' (a coefficient of {case.wanted:g} does nothing)' if case.wanted else ''}"
    bias = case.bias
    moves = f"sign, {bias.rate:g} a step" if bias and bias.rate else "there, and nothing moves it"
    yield f"  bias      {moves if bias else 'none'}"
    if case.z_loss:
        yield f"  z-loss    {case.z_loss:g}"
    yield f"  step      {_step(case.batch)}"
    if expert_parallel:
        size = case.batch.micro_batch
        reach = f"{expert_parallel * size} {case.batch.unit}" if size else "their micro-batches"
        text = f"{expert_parallel} ranks share out the experts and wait for the load of {reach} together"
        yield wrap(f"  speed     {text}: `equipoise plan` says what that costs", INDENT)


def _step(batch: Batch) -> str:
    steps = "?" if batch.accumulation is None else batch.accumulation
    ranks = "?" if batch.ranks is None else batch.ranks
    text = (
        f"{batch.micro_batch or '?'} {batch.unit} x {steps} micro-batch{'' if steps == 1 else 'es'} x {ranks} "
        f"rank{'' if ranks == 1 else 's'}"
    )
    return f"{text} = {batch.whole}" if batch.whole else text


def _finding(one: Finding) -> str:
    why = f". {one.why[0].upper()}{one.why[1:]}" if one.why else ""
    source = f" [{one.source}]" if one.source else ""
    return wrap(clean(f"{MARKS[one.severity]:8}{one.what}{why}{source}"), " " * 8)


def _advice(case: Diagnosis) -> Iterator[str]:
    if case.ours:
        yield wrap(f"what equipoise does with both, and what it refuses: {case.guide}")
        return
    if case.fix and case.style:
        yield f"in {case.engine}, write:\n" + "\n".join(f"  {line}" for line in as_settings(case.fix, case.style))
    if case.wider:
        settings = "\n".join(f"  {line}" for line in as_settings(case.wider, case.style))
        yield wrap(f"in {case.engine}, over the whole step (it pushes with 1/W of its coefficient):") + f"\n{settings}"
    lines = [f"  {one.at(case.host)}\n{wrap(f'      {one.what_for}', ' ' * 6)}" for one in policies(case)]
    where = f" ({case.guide})" if case.guide else "" if case.host else ", as policies"
    yield f"with equipoise{where}:\n" + "\n".join(lines)
