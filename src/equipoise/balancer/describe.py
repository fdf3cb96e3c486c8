"""What a balancer found and assumed, as text of at most 80 columns: nothing that it guesses stays hidden."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ..distributed import Ranks
from ..external.carrier import RouterCarrier
from ..policies.expert_bias import ExpertBias
from ..policies.losses import AuxLoss, Coefficient, EntropyLoss, ZLoss
from ..policies.schedule import Schedule, ScheduledPolicy
from ..policies.self_setting import Ratio, Target
from .declared_step import DeclaredStep
from .layer_group import Layer
from .metrics import StepStats, shown_signals
from .signals import SIGNALS

__all__ = ["describe"]

WIDTH = 80
LONG = {0: -1, 1: 1, 5: -1}  # columns that may have to be clipped: to their last letters, or to their first
LOOKS = "none: loads are measured and nothing is balanced; the model's own balance loss is as it was"


def describe(
    layers: Sequence[Layer],
    schedule: Schedule,
    ranks: Ranks,
    *,
    switched_off: Sequence[str],
    ends_with: str,
    declared: DeclaredStep,
    reduction: str,
    raises: bool,
    last: Sequence[StepStats],
    step: int,
    attached: bool = True,
) -> str:
    """See ``Balancer.describe``."""
    rows = [("router", "class", "E", "K", "gate", "bias", "learns"), *map(_row, layers)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    room = WIDTH - 2 * (len(widths) - 1) - sum(width for i, width in enumerate(widths) if i not in LONG)
    for done, i in enumerate(sorted(LONG, key=widths.__getitem__)):  # who needs less leaves more to the others
        widths[i] = min(widths[i], room // (len(LONG) - done))
        room -= widths[i]
    rows = [tuple(_clipped(cell, LONG.get(i, 1) * widths[i]) for i, cell in enumerate(row)) for row in rows]
    table = _merged(["  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows])
    facts = {
        "routers": f"{len(layers)}",
        "layouts": "; ".join(dict.fromkeys(_layout(layer) for layer in layers)),
        "policies": "; ".join(_policy(scheduled) for scheduled in schedule) or LOOKS,
        "tokens": _tokens(declared, reduction),
        "a step ends": f"with {ends_with}, as the last one did" if ends_with else _step_to_come(),
        "ranks": _ranks(ranks),
        "the last step": _sizes(last, ranks),
        "signals": _signals(shown_signals(last, schedule, step)) if last else "none yet",
        "switched off": "; ".join(switched_off) or "nothing of the model's own",
        "on a fault": "raises, on all ranks" if raises else "warns, leaves the step unbalanced and goes on",
    }
    if not attached:  # of a training that ended, what it declared and switched off is no longer so
        facts = {"removed": "the model is balanced by nobody; what was switched off is as it was", **facts}
        del facts["tokens"], facts["switched off"]
    if any(layer.router.traits.idle_experts for layer in layers):
        facts["E"] = "experts, and after + ids that are no load: of dropped choices, of experts that do no work"
    if any(bool(one.of("replayed_choices").any()) for one in last):
        facts["replay"] = "the last step dispatched recorded experts: loads and f are theirs, and no bias moved"
    wide = max(map(len, facts)) + 2
    lines = [
        textwrap.fill(text, WIDTH, initial_indent=f"{name:{wide}}", subsequent_indent=" " * wide)
        for name, text in facts.items()
    ]
    return "\n".join([*lines, "", *(line.rstrip() for line in table)])


def _clipped(text: str, most: int) -> str:
    """At most so many letters: the first, of a negative number the last, as of a name the end tells more."""
    if len(text) <= abs(most):
        return text
    return f"...{text[most + 3 :]}" if most < 0 else f"{text[: most - 3]}..."


def _row(layer: Layer) -> tuple[str, ...]:
    router, module = layer.router, layer.router.module
    top_k = str(router.top_k)
    carried = isinstance(router, RouterCarrier)  # a child of the router, which it is named after
    return (
        (layer.name.rpartition(".")[0] if carried else layer.name) or "(the model itself)",
        type(module).__name__ + ("" if module is router else " (carrier)" if carried else " (output)"),
        str(router.num_experts) + (f"+{idle}" if (idle := router.traits.idle_experts) else ""),
        top_k,
        router.gate,
        router.bias_owner,
        "yes" if layer.trainable else "no: frozen",
    )


def _layout(layer: Layer) -> str:
    if layer.router.batch_context is not None:
        return "sequences and padding read where the model, or a part of it, is called with a router's tokens"
    return "as the layer is told with each call (MoE(batch_first=), TokenLayout)"


def _policy(scheduled: ScheduledPolicy) -> str:
    policy = scheduled.policy
    window = (
        ""
        if not scheduled.start and scheduled.end is None
        else f" from step {scheduled.start} to {scheduled.end or 'the end'}"
    )
    if isinstance(policy, EntropyLoss | ZLoss):
        return (
            f"{type(policy).__name__}{f', coef {_coefficient(policy.coef)}' * isinstance(policy, EntropyLoss)}{window}"
        )
    of = "" if policy.tokens is None else f", tokens {policy.tokens!r} alone"
    match policy:
        case AuxLoss():
            coef = _coefficient(policy.coef)
            how = f", {policy.estimator}" if policy.estimates else ""
            return f"AuxLoss {policy.scope}, coef {coef}{how}{of}{_view(policy)}{window}"
        case ExpertBias():
            where = "" if policy.place == ExpertBias.place else f", place {policy.place}"
            scope = "" if policy.scope == ExpertBias.scope else f", scope {policy.scope}"
            return f"ExpertBias {policy.rule}, rate {policy.rate:g}{where}{scope}{of}{_view(policy)}{window}"


def _coefficient(coef: Coefficient) -> str:
    match coef:
        case Ratio(share):
            return f"that sets itself: its gradient {share:g} of the language model's"
        case Target(wanted):
            return f"that sets itself: MaxVio {wanted:g}"
    return "a schedule" if callable(coef) else f"{coef:g}"


def _view(policy: AuxLoss | ExpertBias) -> str:
    return "" if policy.view is None else f", {policy.view}"


def _tokens(declared: DeclaredStep, reduction: str) -> str:
    if isinstance(declared.tokens, Mapping):
        return "declared for each router of this step"
    if declared.tokens is not None:
        return f"declared for this step: {declared.tokens:g}"
    if reduction == "sum":
        return "to be declared with begin_step(tokens=...) before each step"
    return "counted at each router; every micro-batch weighs the same, unless begin_step(tokens=...) says more"


def _step_to_come() -> str:
    return "with the outermost step of the torch optimizer that holds the routers' parameters; none was seen yet"


def _ranks(ranks: Ranks) -> str:
    if ranks.all.size == 1:
        return "one process alone"
    assumed = ", which was assumed: pass ranks= to say otherwise" if ranks.assumed else ""
    shards = f", sequences cut over {ranks.sequence_shards.size}" if ranks.sequence_shards.size > 1 else ""
    return f"{ranks.all.size} share a step, {ranks.data.size} hold these layers{shards}{assumed}"


def _sizes(last: Sequence[StepStats], ranks: Ranks) -> str:
    """Over how many sequences each scope took f in it; of a layer that ran once in a pass, where there is one."""
    ran = []
    for one in last:
        names = ("calls", "sequences", "nonempty_sequences")
        of_layers = zip(*(one.of(name).tolist() for name in names), strict=True)
        ran += [(*numbers, one.spec.micro_sequences) for numbers in of_layers if numbers[0] > 0]
    if not ran:
        return "none yet" if not last else "no router ran in it"
    calls, sequences, known, together = min(ran, key=lambda one: one[0])
    if not known:
        return "how its tokens lay in sequences is not known"
    shards = ranks.sequence_shards.size
    data, micro, whole = max(ranks.data.size // shards, 1), together or sequences / calls, sequences / shards
    sizes = f"{micro:g} (micro_batch), {micro * data:g} (data_parallel), {whole:g} (global_batch)"
    return f"took f over 1 sequence (sequence), {sizes}; data ranks: {data}, micro-batches: {whole / micro / data:g}"


def _signals(shown: Mapping[str, list[int]]) -> str:
    """What a step shows that people miss, and what to do."""
    lines = []
    for name, layers in shown.items():
        which = ", ".join(map(str, layers[:4])) + (f" and {len(layers) - 4} more" if len(layers) > 4 else "")
        lines.append(f"{name}, layer {which}: {SIGNALS[name].says}; {SIGNALS[name].do}")
    return "; ".join(lines) or "none"


def _merged(lines: list[str], most: int = 12) -> list[str]:
    """The middle of a long table is left out."""
    if len(lines) <= most + 2:
        return lines
    return [*lines[: most // 2 + 1], f"... {len(lines) - most - 1} more ...", *lines[-most // 2 :]]
