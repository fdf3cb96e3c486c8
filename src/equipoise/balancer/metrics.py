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

from ..autograd.spec import StatsSpec
from ..devices import to_device
from ..functional.load_view import target_excess
from ..functional.metrics import cv, dead_experts, maxvio, normalized_entropy
from ..policies.schedule import Schedule

__all__ = ["StepStats", "metrics"]


FLIPS = (
    "activation checkpointing chose other experts in its recompute than forward did (balance/recompute_flips), so "
    "gradients are of a routing that was not used: keep the router out of the checkpoint, or replay its random numbers"
)


SUMMED = ("dead_experts", "recompute_flips")  # over layers, where others are averaged


@dataclass(frozen=True)
class StepStats:
    """The global batch at the n layers of one spec, summed over micro-batches and ranks."""

    spec: StatsSpec
    places: Sequence[int]  # (n) of each layer in the model's order
    sums: Tensor  # (n, spec.step_size) fp64
    biases: Sequence[tuple[list[int], Tensor | None]]  # of this rank's layers: rows, (rows, E), NaN where there is none

    @property
    def counts(self) -> Tensor:
        """(n, E)"""
        return self.spec.counts(self.sums)

    @property
    def probs(self) -> Tensor:
        """(n, E) sums of the gate probabilities."""
        return self.spec.probs(self.sums)

    def of(self, scalar: str) -> Tensor:
        return self.spec.scalar(self.sums, scalar)

    @functools.cached_property
    def chooses(self) -> Tensor:
        """(n,) whether some token left an expert out; where all go to all experts every load is even, and says nothing.

        Looked for in the counts, because top-k may change while one trains.
        """
        return self.counts.sum(dim=1) < self.of("routed_tokens") * self.spec.num_experts


def metrics(committed: Sequence[StepStats], schedule: Schedule, step: int, *, layers: bool = True) -> dict[str, float]:
    """Flat names to numbers: ``balance/x`` is a mean over layers (SUMMED: a sum), ``balance/layer_03/x`` one.

    What a layer without tokens, or without a choice, cannot know is left out of both. ``layers``: those of one as well.
    """
    loads, policies = (
        _numbers(committed, _layer_metrics),
        _numbers(committed, lambda one: _policies(one, schedule, step)),
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
        if key.endswith(("loss", "maxvio")):
            found |= {key: fmean(of_layers)} if (of_layers := _known(numbers)) else {}
        elif committed[0].spec.norms and language > 0 and sum(numbers) >= 0:
            # not known where autograd left the accumulators alone (``backward(inputs=...)``): left out, not 0
            found[key] = math.sqrt(sum(numbers) / language)
    found["tokens"] = min(number if number > 0 else max(tokens) for number in tokens)  # a layer may run twice, or never
    if found.get("recompute_flips"):
        warnings.warn(FLIPS, stacklevel=3)
    return {f"balance/{key}": float(number) for key, number in found.items()}


def _known(numbers: Sequence[float]) -> list[float]:
    return [number for number in numbers if number == number]


def _numbers(
    committed: Sequence[StepStats], measure: Callable[[StepStats], dict[str, Tensor]]
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


def _layer_metrics(one: StepStats) -> dict[str, Tensor]:
    """(n,) fp64 each; NaN where there were no tokens, or no choice of experts."""
    chooses = one.chooses
    counts = one.counts * chooses.unsqueeze(1)  # without a choice as if nothing was counted
    found = {
        "maxvio_global": maxvio(counts),
        "maxvio_micro_batch": one.of("maxvio_micro_batch") / (one.of("nonempty_micro_batches") * chooses),
        "maxvio_sequence": one.of("maxvio_sequence") / (one.of("nonempty_sequences") * chooses),
        "maxvio_gate": maxvio(one.probs),
        "cv_global": cv(counts),
        "entropy_global": normalized_entropy(counts),
        "dead_experts": dead_experts(counts),
        "topk_score": one.of("topk_score") / one.of("routed_tokens"),
    }
    replayed = one.of("replayed_choices")
    found["replay_gap"] = one.of("replay_gap") / torch.where(replayed > 0, replayed, torch.nan)
    if not one.spec.observe_only:  # in backward nothing was looked at
        found["recompute_flips"] = one.spec.step_column(one.sums, "recompute_flips")
    for rows, bias in one.biases:
        if bias is not None:
            largest = found.setdefault("bias_max", torch.full_like(one.sums[:, 0], torch.nan))
            at = to_device(rows, largest.device).long()
            found["bias_max"] = largest.index_copy(0, at, bias.abs().amax(dim=1).double().to(largest.device))
    return found


def _policies(one: StepStats, schedule: Schedule, step: int) -> dict[str, Tensor]:
    """For each policy the loss value (1 = balanced) and the squared norm of its gradient at the router, (n,) each.

    Where it sees groups or targets, also by how much the busiest group is above its own.
    """
    spec, sums, routed = one.spec, one.sums, one.of("routed_tokens")
    chosen = torch.where(one.chooses, routed, torch.nan)
    found = {"tokens": one.of("tokens"), "language": spec.lm_norm(sums)}
    for scheduled, _ in (pair for pair in schedule.losses if pair[0].active(step)):
        values = spec.values(sums)[:, scheduled.term] + spec.deferred_values(sums)[:, scheduled.term]
        found[f"{scheduled.name}/loss"] = values / chosen
        found[f"{scheduled.name}/gradient_ratio"] = spec.term_norm(sums, scheduled.term)
    for scheduled, policy in (pair for pair in (*schedule.losses, *schedule.biases) if pair[0].active(step)):
        if policy.view is not None:
            found[f"{scheduled.name}/maxvio"] = target_excess(policy.view, one.counts * one.chooses.unsqueeze(1))
    for scheduled, _ in (pair for pair in schedule.z_losses if pair[0].active(step)):
        found[f"{scheduled.name}/loss"] = one.of("lse_square") / routed
        found[f"{scheduled.name}/gradient_ratio"] = spec.term_norm(sums, len(spec.terms))
    return found
