"""What a committed step shows: from the summed statistics of all routers to named numbers, with one transfer."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from ..autograd.spec import Plan
from ..devices import sent
from ..functional.metrics import cv, dead_experts, maxvio, normalized_entropy
from ..policies.expert_bias import ExpertBias
from ..policies.losses import AuxLoss
from ..policies.switch import Timed

__all__ = ["Committed", "metrics"]


FLIPS = (
    "activation checkpointing chose other experts in its recompute than forward did (balance/recompute_flips), so "
    "gradients are of a routing that was not used: keep the router out of the checkpoint, or replay its random numbers"
)


SUMMED = ("dead_experts", "recompute_flips")  # over layers, where others are averaged


@dataclass(frozen=True)
class Committed:
    """The global batch at the n layers of one plan, summed over micro-batches and ranks."""

    plan: Plan
    places: Sequence[int]  # (n) of each layer in the model's order
    sums: Tensor  # (n, sums_size(plan)) fp64
    biases: Sequence[
        tuple[list[int], Tensor | None]
    ]  # of this rank's layers: rows, (rows, E) with NaN for those without

    @property
    def counts(self) -> Tensor:
        """(n, E)"""
        return self.sums[:, : self.plan.num_experts]

    @property
    def probs(self) -> Tensor:
        """(n, E) sums of the gate probabilities."""
        return self.sums[:, self.plan.num_experts : 2 * self.plan.num_experts]

    def of(self, scalar: str) -> Tensor:
        return self.sums[:, self.plan.at(scalar)]

    @functools.cached_property
    def chooses(self) -> Tensor:
        """(n,) whether some token left an expert out; where all go to all experts every load is even, and says nothing.

        Looked for in the counts, because top-k may change while one trains.
        """
        return self.counts.sum(dim=1) < self.of("reached") * self.plan.num_experts


def metrics(
    committed: Sequence[Committed], timeline: Sequence[Timed], step: int, *, layers: bool = True
) -> dict[str, float]:
    """Flat names to numbers: ``balance/x`` is a mean over layers (SUMMED: a sum), ``balance/layer_03/x`` one.

    What a layer without tokens, or without a choice, cannot know is left out of both. ``layers``: those of one as well.
    """
    loads, policies = (
        _numbers(committed, _layer_metrics),
        _numbers(committed, lambda one: _policies(one, timeline, step)),
    )
    known = {key: _known(numbers) for key, numbers in loads.items()}
    found = {
        f"layer_{i:02d}/{key}": numbers[i]
        for i in range(layers * sum(len(one.places) for one in committed))
        for key, numbers in loads.items()
        if numbers[i] == numbers[i]  # not every layer has a bias, or tokens
    }
    found |= {key: sum(numbers) if key in SUMMED else fmean(numbers) for key, numbers in known.items() if numbers}
    found["layers_without_tokens"] = sum(number != number for number in loads["topk_score"])
    language, tokens = sum(policies.pop("language")), policies.pop("tokens")
    for key, numbers in policies.items():
        if key.endswith("loss"):
            found |= {key: fmean(of_layers)} if (of_layers := _known(numbers)) else {}
        elif committed[0].plan.norms and language > 0 and sum(numbers) >= 0:
            # not known where autograd left the meter alone (``backward(inputs=...)``): left out rather than called 0
            found[key] = math.sqrt(sum(numbers) / language)
    found["tokens"] = min(number if number > 0 else max(tokens) for number in tokens)  # a layer may run twice, or never
    if found.get("recompute_flips"):
        warnings.warn(FLIPS, stacklevel=3)
    return {f"balance/{key}": float(number) for key, number in found.items()}


def _known(numbers: Sequence[float]) -> list[float]:
    return [number for number in numbers if number == number]


def _numbers(
    committed: Sequence[Committed], measure: Callable[[Committed], dict[str, Tensor]]
) -> dict[str, list[float]]:
    """Each measure of all layers in the model's order, with one wait for the device; NaN where a layer has none."""
    tables = [measure(one) for one in committed]
    numbers = iter(torch.cat([torch.stack(list(table.values())).flatten() for table in tables]).tolist())
    layers = sum(len(one.places) for one in committed)
    found: dict[str, list[float]] = {}
    for one, table in zip(committed, tables, strict=True):
        for key in table:
            row = found.setdefault(key, [math.nan] * layers)
            for place in one.places:
                row[place] = next(numbers)
    return found


def _layer_metrics(one: Committed) -> dict[str, Tensor]:
    """(n,) fp64 each; NaN where there were no tokens, or no choice of experts."""
    chooses = one.chooses
    counts = one.counts * chooses.unsqueeze(1)  # without a choice as if nothing was counted
    found = {
        "maxvio_global": maxvio(counts),
        "maxvio_micro_batch": one.of("maxvio_micro_batch") / (one.of("micro_batches") * chooses),
        "maxvio_sequence": one.of("maxvio_sequence") / (one.of("sequences") * chooses),
        "maxvio_gate": maxvio(one.probs),
        "cv_global": cv(counts),
        "entropy_global": normalized_entropy(counts),
        "dead_experts": dead_experts(counts),
        "topk_score": one.of("topk_score") / one.of("reached"),
    }
    if not one.plan.looks:  # in backward nothing was looked at
        found["recompute_flips"] = one.sums[:, -1]
    for rows, bias in one.biases:
        if bias is not None:
            largest = found.setdefault("bias_max", torch.full_like(one.sums[:, 0], torch.nan))
            at = sent(rows, largest.device).long()
            found["bias_max"] = largest.index_copy(0, at, bias.abs().amax(dim=1).double().to(largest.device))
    return found


def _policies(one: Committed, timeline: Sequence[Timed], step: int) -> dict[str, Tensor]:
    """For each policy the loss value (1 = balanced) and the squared norm of its gradient at the router, (n,) each."""
    plan, reached = one.plan, one.of("reached")
    chosen = torch.where(one.chooses, reached, torch.nan)
    late_values, norms = one.sums[:, plan.size : -1], one.sums[:, plan.forward_size : plan.size]
    found, term = {"tokens": one.of("tokens"), "language": norms[:, 0]}, -1
    for timed in timeline:
        is_loss = isinstance(timed.policy, AuxLoss)
        term += is_loss
        if not timed.active(step) or isinstance(timed.policy, ExpertBias):
            continue
        found[f"policy_{timed.index}/loss"] = (
            (one.sums[:, plan.values_at + term] + late_values[:, term]) / chosen
            if is_loss
            else one.of("lse_square") / reached
        )
        found[f"policy_{timed.index}/gradient_ratio"] = norms[:, 1 + (term if is_loss else len(plan.terms))]
    return found
