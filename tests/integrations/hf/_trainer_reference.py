"""What a step of any Trainer has to give, in float64: cross entropy and the balance law, autograd on a twin.

The same twin in fp32 says how far rounding alone goes on this machine. Nothing here imports equipoise. The language
model's loss depends on how a Trainer weighs micro-batches and ranks, so it is told which rows share a mean; the balance
loss does not: coef · E · <f, p_t>, a mean over all tokens of the step.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from _rounding import OURS, Float64, allowed, distance, worst
from integrations.hf._law import Twin, bias_of, law, naive_bias_step
from integrations.hf._trainer import Text
from integrations.hf.families import build

__all__ = ["COEF", "POLICIES", "RATE", "Expected", "check", "expected", "policies_for", "same_gradients"]

COEF, RATE = 0.3, 0.005
POLICIES: list[dict] = [
    {"kind": "aux", "scope": "sequence", "coef": COEF},
    {"kind": "aux", "scope": "global_batch", "coef": COEF, "estimator": "previous"},
]


def policies_for(family: str) -> list[dict]:
    """The two losses, and the bias where the model has one."""
    return [*POLICIES, {"kind": "bias", "rate": RATE}] if bias_of(build(family)) else POLICIES


@dataclass
class Expected:
    """Of each optimizer step, weights unchanged."""

    gradients: list[dict[str, Tensor]] = field(default_factory=list)
    bare: list[dict[str, Tensor]] = field(default_factory=list)  # without balance losses
    loads: list[list[list[int]]] = field(default_factory=list)
    biases: list[dict[str, Tensor]] = field(default_factory=list)
    values: list[list[float]] = field(default_factory=list)  # of the two balance losses, a mean over layers
    pushes: list[float] = field(default_factory=list)  # how far the gradient is from that without balance losses
    tolerance: float = 0.0  # of a run in fp32
    narrow: Expected | None = None  # the same by plain autograd in fp32, on this machine


def rows_of(first: int, count: int) -> dict[str, Tensor]:
    """Some rows of ``Text``, stacked."""
    text = [Text()[first + i] for i in range(count)]
    return {key: torch.stack([row[key] for row in text]) for key in text[0]}


def expected(
    family: str,
    rows_of_steps: tuple[int, ...] = (8, 8),
    *,
    batches: list[dict[str, Tensor]] | None = None,
    means: list[list[int]] | None = None,
    smoothing: float = 0.0,
    prepare: Any = None,
    coef: float | None = None,
) -> Expected:
    """The policies of ``policies_for`` over the next so many rows of ``Text`` in each step.

    Args:
        batches: other rows, a padded batch for each step.
        means: rows (by their place in the step) whose label tokens share a mean; the loss is the mean of those means.
            Default: all label tokens of the step weigh the same.
        smoothing: of the labels.
        prepare: what a function makes of the model (PEFT).
        coef: of both losses; default COEF.
    """
    coef = COEF if coef is None else coef  # now, because tests set it
    given = batches or [rows_of(sum(rows_of_steps[:i]), n) for i, n in enumerate(rows_of_steps)]
    (wide, wide_twin), (model, twin) = (_prepared(family, prepare) for _ in range(2))
    wide.double().set_experts_implementation("eager")  # grouped_mm knows no float64
    with Float64():
        found = _steps(wide, wide_twin, given, means, smoothing, coef)
    narrow = _steps(model, twin, given, means, smoothing, coef)
    assert narrow.loads == found.loads, "a choice hangs on the last bit"
    found.tolerance, found.narrow = max(map(allowed, narrow.gradients, found.gradients)), narrow
    return found


def _prepared(family: str, prepare: Any) -> tuple[Any, Twin]:
    twin = Twin(build(family), family)
    return (twin.model if prepare is None else prepare(twin.model)).train(), twin


def _steps(model: Any, twin: Twin, given: list, means: Any, smoothing: float, coef: float) -> Expected:
    found = Expected()
    previous: dict[str, list[int]] | None = None
    for rows_of_step in given:
        batch = dict(rows_of_step)
        labels = batch.pop("labels")
        rows, length = labels.shape
        mask_T = batch["attention_mask"].bool().view(-1).tolist()
        model.zero_grad()
        logits = model(**batch).logits.double()
        parts = means or [list(range(rows))]
        own: Any = sum(_cross_entropy(logits[part], labels[part], smoothing) for part in parts) / len(parts)
        of_sequences = law(twin, [t // length for t in range(rows * length)], mask_T, coef)
        of_before = law(twin, [0] * (rows * length), mask_T, coef, previous) if previous else of_sequences * 0
        own.backward(retain_graph=True)
        found.bare.append(_gradients(model))
        (of_sequences + of_before).backward()
        found.gradients.append(_gradients(model))
        found.pushes.append(distance(found.bare[-1], found.gradients[-1]))
        previous = twin.counts(mask_T)
        found.loads.append(list(previous.values()))
        found.values.append([float(v.detach()) / coef / len(previous) for v in (of_sequences, of_before)])
        moved = {}
        biases = {name: bias_E for name, bias_E in bias_of(model).items() if "original_module" not in name}
        for (name, bias_E), counts in zip(biases.items(), previous.values(), strict=False):
            bias_E.copy_(torch.tensor(naive_bias_step(bias_E.tolist(), counts, RATE)))
            moved[name] = bias_E.clone()
        found.biases.append(moved)
    return found


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _cross_entropy(logits_BSV: Tensor, labels_BS: Tensor, smoothing: float) -> Tensor:
    """The mean over label tokens, each predicted from the position before it."""
    total: Any = 0.0
    count = 0
    for b, row in enumerate(labels_BS.tolist()):
        for t, label in enumerate(row[1:]):
            if label != -100:
                log_probs_V = logits_BSV[b, t].log_softmax(-1)
                total = total - (1 - smoothing) * log_probs_V[label] - smoothing * log_probs_V.mean()
                count += 1
    return total / count


def check(got: dict[str, Any], want: Expected, tolerance: float | None = None) -> None:
    """A run in fp32, or in float64 with the tolerance ``OURS``."""
    off = want.tolerance if tolerance is None else tolerance
    assert got["steps"] == want.loads
    logs = [entry for entry in got["logs"] if "loss" in entry]
    for step, (found, gradients) in enumerate(zip(got["gradients"], want.gradients, strict=True)):
        assert 0.01 * want.pushes[step] > off, "a push that is 1.01 times too large would pass"
        same_gradients(found, gradients, off)
        assert found.keys() == gradients.keys()
        for name, bias_E in want.biases[step].items():
            assert off == OURS or got["biases"][step][name].dtype == torch.float32
            assert torch.allclose(got["biases"][step][name].double(), bias_E, rtol=0, atol=1e-7), name
        for i, value in enumerate(want.values[step]):
            assert logs[step][f"balance/policy_{i}/loss"] == pytest.approx(value, rel=off, abs=1e-9)


def same_gradients(found: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    """Relative to the largest entry of each tensor, and to a thousandth of the largest of all where one is tiny."""
    error, name = worst(found, want)
    assert error <= tolerance, f"{name}: error {error:.3g}, allowed {tolerance:.3g}"
