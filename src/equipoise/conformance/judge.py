"""Holds what a router gave against what is right, and says by what it is off."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from .battery import LAYERS, MICRO_BATCHES, RANKS, TOP_K, Check
from .reference import Cut, bias_after, counts_of, gradient_of
from .task import Adapter, Answer, Task

__all__ = ["AGAIN", "COLUMNS", "RIGHT", "Finding", "judge"]

COLUMNS = ("gradient", "counts", "bias")
RIGHT, AGAIN = "right", "as above"  # the second: right but for the factor of the first check, which is one fault
FINITE = "finite"  # all that is asked of a gradient whose rounding is no fault
ROUNDING = 1e-3  # far above that of float32 here, far below any fault: those are off by a factor, or by per cents


@dataclass(frozen=True)
class Finding:
    """A check's outcome.

    Args:
        words: by column: "right", or how far off; "" for what the router does not offer. Under "step" alone: the error
            that ended it.
        skipped: why the check was not made; empty where it was.
        factor: by which the gradient is a multiple of what is right; 1 where it is right, or no multiple.
    """

    check: Check
    words: dict[str, str] = field(default_factory=dict)
    skipped: str = ""
    factor: float = 1.0

    @property
    def wrong(self) -> list[str]:
        """The columns that are."""
        return [column for column, word in self.words.items() if word not in (RIGHT, AGAIN, FINITE, "")]

    @property
    def passed(self) -> bool:
        return not self.wrong

    @property
    def known(self) -> str:
        """Public defects of this kind, numbers of docs/defects.md."""
        wrong = self.wrong
        return ", ".join(dict.fromkeys(", ".join(self.check.known.get(c, "") for c in wrong).split(", "))).strip(", ")


def judge(
    check: Check, adapter: type[Adapter], tasks: Sequence[Task], answers: Sequence[Answer], factor: float = 1.0
) -> Finding:
    """All ranks have answered. ``factor``: of the first check, which the others are not blamed for as well."""
    cut = [task.micro_batches for task in tasks]
    first = tasks[0]
    counts = [counts_of(weight_ED, cut, first.top_k) for weight_ED in first.weights_LED]
    judged = check.text != "large"  # a score of 1 has no next one in floating point: choices may tie there
    gradient, found = _gradient(check, adapter, first, cut, answers, factor)
    words = {
        "gradient": gradient,
        "counts": _counts(counts, answers) if adapter.counts and judged else "",
        "bias": _bias(counts, adapter.bias_rate, answers) if adapter.bias_rate and judged else "",
    }
    return Finding(check, words, factor=found)


def _gradient(
    check: Check, adapter: type[Adapter], task: Task, cut: Cut, answers: Sequence[Answer], factor: float
) -> tuple[str, float]:
    got_LED = answers[0].gradient_LED.double()
    if got_LED.shape != task.weights_LED.shape:
        return f"shape {tuple(got_LED.shape)}", 1.0
    if not bool(got_LED.isfinite().all()):
        return "not finite", 1.0
    if any(not _same(got_LED, other.gradient_LED.double()) for other in answers[1:]):
        return "differs between ranks", 1.0
    if check.text != "plain":
        return FINITE, 1.0
    found = []
    for by_tokens in (True, False) if check.padding and adapter.scope != "global_batch" else (True,):
        right_LED = got_LED.new_zeros(got_LED.shape)
        for layer, weight_ED in enumerate(task.weights_LED):
            right_LED[layer] = gradient_of(
                weight_ED, cut, task.top_k, task.coef, adapter.scope, gate=adapter.gate, by_tokens=by_tokens
            )
        found.append(_off(got_LED, right_LED, factor))
    return min(found, key=lambda one: one[0] not in (RIGHT, AGAIN))


def _off(got: Tensor, right: Tensor, known: float) -> tuple[str, float]:
    """A multiple has a name; anything else a size."""
    size = float(right.norm())
    for factor, word in ((1.0, RIGHT), (known, AGAIN)):
        if float((got - factor * right).norm()) <= ROUNDING * factor * size:
            return word, factor
    if float(got.norm()) <= ROUNDING * size:
        return "nothing arrives", 1.0
    factor = float((got * right).sum()) / size**2
    if float((got - factor * right).norm()) <= ROUNDING * float(got.norm()):
        return f"x {factor:.4g}{_cause(factor)}", factor
    return f"off by {float((got - known * right).norm()) / known / size:.0%}", 1.0


def _cause(factor: float) -> str:
    """What a wrong factor is made of: products of two of the numbers that the batch was cut by."""
    numbers = {"K": float(TOP_K), "ranks": float(RANKS), "micro-batches": float(MICRO_BATCHES), "layers": float(LAYERS)}
    single = {"": 1.0, **numbers, **{f"1 / {name}": 1 / value for name, value in numbers.items()}}
    for (name, value), (other, second) in itertools.combinations_with_replacement(single.items(), 2):
        if math.isclose(value * second, factor, rel_tol=5e-3):
            both = " · ".join(one for one in (name, other) if one)
            return f" = {both.replace(' · 1 / ', ' / ')}"
    return ""


def _counts(right: Sequence[Sequence[int]], answers: Sequence[Answer]) -> str:
    for answer in answers:
        if answer.counts_LE is None:
            return "none given"
        got = answer.counts_LE.double().reshape(len(right), -1).tolist()
        if got != [[float(one) for one in layer] for layer in right]:
            total, wanted = math.fsum(map(math.fsum, got)), math.fsum(map(math.fsum, right))
            if got == [[one * total / wanted for one in layer] for layer in right]:
                return f"x {total / wanted:.4g}"
            return f"{total:.0f} of {wanted:.0f}" if total != wanted else "other experts"
    return RIGHT


def _bias(counts: Sequence[Sequence[int]], rate: float, answers: Sequence[Answer]) -> str:
    """A constant added to all experts chooses the same ones, so it is no fault."""
    for answer in answers:
        if answer.bias_LE is None:
            return "none given"
        if not _same(answer.bias_LE.double(), answers[0].bias_LE.double()):  # type: ignore[union-attr]
            return "differs between ranks"
    got_LE = answers[0].bias_LE.double().reshape(len(counts), -1)  # type: ignore[union-attr]
    right_LE = got_LE.new_tensor([bias_after(layer, rate) for layer in counts])
    apart = (got_LE - got_LE.mean(1, keepdim=True)) - (right_LE - right_LE.mean(1, keepdim=True))
    if float(apart.abs().max()) <= 1e-2 * rate:
        return RIGHT
    return "does not move" if float((got_LE - got_LE[:, :1]).abs().max()) == 0 else "moves otherwise"


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool((one == other).all())
