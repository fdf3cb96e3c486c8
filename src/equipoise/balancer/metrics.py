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
from ..functional.metrics import cv, dead_experts, maxvio, maxvio_noise_floor, normalized_entropy
from ..functional.routing import PLACES
from ..policies.losses import coefficient
from ..policies.schedule import Schedule
from .signals import SIGNALS, signals

__all__ = ["StepStats", "metrics", "shown_signals"]


FLIPS = (
    "activation checkpointing chose other experts in its recompute than forward did (balance/recompute_flips), so "
    "gradients are of a routing that was not used: keep the router out of the checkpoint, or replay its random numbers"
)


BOUNDED = ("sigmoid", "softmax")  # gates whose scores lie between 0 and 1
FOR_SIGNALS = ("bias_range", "bias_drift")  # alone
SUMMED = ("dead_experts", "recompute_flips")  # over layers, where others are averaged


@dataclass(frozen=True)
class StepStats:
    """The global batch at the n layers of one spec, summed over micro-batches and ranks."""

    spec: StatsSpec
    places: Sequence[int]  # (n) of each layer in the model's order
    sums: Tensor  # (n, spec.step_size) fp64
    # Of this rank's layers, for the next step: rows; biases, NaN where there is none, and their drift, (rows, E) each;
    # coefficients (rows,)
    own: Sequence[tuple[list[int], Tensor | None, Tensor | None, dict[str, Tensor]]]

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
    loads, policies = _by_layer(committed, schedule, step)
    shown = _signals(committed, schedule, step, loads, policies) if schedule else {}
    for key in FOR_SIGNALS:
        loads.pop(key, None)
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
    if schedule:
        found |= {f"signals/{name}": len(shown.get(name, ())) for name in SIGNALS}
    for key, numbers in policies.items():
        if key.endswith(("loss", "maxvio", "coef")):
            found |= {key: fmean(of_layers)} if (of_layers := _known(numbers)) else {}
            if layers and key.endswith("coef"):
                found |= {f"layer_{i:02d}/{key}": number for i, number in enumerate(numbers) if number == number}
        elif committed[0].spec.norms and language > 0 and sum(numbers) >= 0:
            # not known where autograd left the accumulators alone (``backward(inputs=...)``): left out, not 0
            found[key] = math.sqrt(sum(numbers) / language)
    found["tokens"] = min(number if number > 0 else max(tokens) for number in tokens)  # a layer may run twice, or never
    if found.get("recompute_flips"):
        warnings.warn(FLIPS, stacklevel=3)
    return {f"balance/{key}": float(number) for key, number in found.items()}


def shown_signals(committed: Sequence[StepStats], schedule: Schedule, step: int) -> dict[str, list[int]]:
    """Name of a signal -> layers that show it, see `signals`."""
    if not (committed and schedule):
        return {}
    return _signals(committed, schedule, step, *_by_layer(committed, schedule, step))


def _by_layer(
    committed: Sequence[StepStats], schedule: Schedule, step: int
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    loads = _numbers(committed, _layer_metrics)
    return loads, _numbers(committed, lambda one: _policies(one, schedule, step))


def _signals(
    committed: Sequence[StepStats],
    schedule: Schedule,
    step: int,
    loads: dict[str, list[float]],
    policies: dict[str, list[float]],
) -> dict[str, list[int]]:
    acting = [one.name for one, loss in schedule.losses if one.active(step) and coefficient(loss, step) > 0]
    chance = [0.0] * len(loads["maxvio_global"])
    for one in committed:
        for place in one.places:
            tokens, choices = int(policies["tokens"][place]), float(one.spec.top_k)
            if "experts_per_token" in loads and loads["experts_per_token"][place] > 0:
                choices = loads["experts_per_token"][place]
            chance[place] = maxvio_noise_floor(tokens, choices, one.spec.num_experts)
    if schedule.bias_place != PLACES[0]:
        loads = {key: numbers for key, numbers in loads.items() if key != "bias_range"}
    pushes = [policies[f"{name}/gradient_ratio"] for name in acting]
    return signals(loads, chance=chance, pushes=pushes if acting else None, language=policies["language"])


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
    if one.spec.idle_experts:
        found["experts_per_token"] = one.counts.sum(dim=1) / one.of("routed_tokens")
    if one.spec.widths is not None:
        widths_E = to_device(one.spec.widths, one.sums.device).double()
        found["active_width"] = one.counts @ widths_E / one.of("routed_tokens")
        found["maxvio_width"] = maxvio(counts * widths_E)
    found["replay_gap"] = one.of("replay_gap") / one.of("replayed_choices")  # NaN where there was none
    if not one.spec.observe_only:  # in backward nothing was looked at
        found["recompute_flips"] = one.spec.step_column(one.sums, "recompute_flips")
    for rows, bias, drift, _ in one.own:
        if bias is not None:
            low, high = bias.aminmax(dim=1)
            values = {"bias_max": torch.maximum(high, -low)}
            if one.spec.gate in BOUNDED:
                values["bias_range"] = high - low
            if drift is not None:
                values["bias_drift"] = drift.abs().amax(dim=1)
            _put(found, one, rows, values)
    return found


def _put(found: dict[str, Tensor], one: StepStats, rows: list[int], values: dict[str, Tensor]) -> None:
    """Numbers of this rank's own layers, NaN at the others."""
    at = to_device(rows, one.sums.device).long()
    for key, values_n in values.items():
        known_n = found.get(key, torch.full_like(one.sums[:, 0], torch.nan))
        found[key] = known_n.index_copy(0, at, values_n.double().to(known_n.device))


def _policies(one: StepStats, schedule: Schedule, step: int) -> dict[str, Tensor]:
    """For each policy the loss value (1 = balanced) and the squared norm of its gradient at the router, (n,) each.

    Where it sees groups or targets, also by how much the busiest group is above its own; of a class of tokens, the
    busiest expert of that class; where it sets its coefficient, that of the next step.
    """
    spec, sums, routed = one.spec, one.sums, one.of("routed_tokens")
    nan = torch.nan
    chosen = torch.where(one.chooses, routed, nan)
    found = {"tokens": one.of("tokens"), "language": spec.lm_norm(sums)}
    for scheduled, policy in (pair for pair in schedule.losses if pair[0].active(step)):
        values = spec.values(sums)[:, scheduled.term] + spec.deferred_values(sums)[:, scheduled.term]
        of = chosen if policy.tokens is None else torch.where(one.chooses, spec.of_class(sums, policy.tokens)[2], nan)
        found[f"{scheduled.name}/loss"] = values / of
        found[f"{scheduled.name}/gradient_ratio"] = spec.term_norm(sums, scheduled.term)
        for rows, _, _, coefs in one.own:
            if scheduled.name in coefs:
                _put(found, one, rows, {f"{scheduled.name}/coef": coefs[scheduled.name]})
    for scheduled, policy in (pair for pair in (*schedule.losses, *schedule.biases) if pair[0].active(step)):
        name, view = policy.tokens, policy.view if scheduled.term < 0 else spec.terms[scheduled.term].view
        counts = (one.counts if name is None else spec.of_class(sums, name)[0]) * one.chooses.unsqueeze(1)
        if view is not None:
            found[f"{scheduled.name}/maxvio"] = target_excess(view, counts)
        elif name is not None:
            found[f"{scheduled.name}/maxvio"] = maxvio(counts)
    for scheduled, _ in (pair for pair in schedule.entropy_losses if pair[0].active(step)):
        found[f"{scheduled.name}/loss"] = spec.values(sums)[:, scheduled.term] / routed
        found[f"{scheduled.name}/gradient_ratio"] = spec.term_norm(sums, scheduled.term)
    for scheduled, _ in (pair for pair in schedule.z_losses if pair[0].active(step)):
        found[f"{scheduled.name}/loss"] = one.of("lse_square") / routed
        found[f"{scheduled.name}/gradient_ratio"] = spec.term_norm(sums, len(spec.terms))
    return found
