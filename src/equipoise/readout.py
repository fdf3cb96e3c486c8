"""What a committed step shows: from the summed statistics of all routers to named numbers, with one transfer."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .functional.losses import load_fractions
from .functional.metrics import cv, dead_experts, maxvio, normalized_entropy
from .meter import Plan
from .policies.expert_bias import ExpertBias
from .policies.losses import AuxLoss, ZLoss
from .policies.switch import Timed

__all__ = ["Committed", "fidelity", "fidelity_sums", "metrics"]

FLIPS = (
    "activation checkpointing chose other experts in its recompute than forward did (balance/recompute_flips), so "
    "gradients are of a routing that was not used: keep the router out of the checkpoint, or replay its random numbers"
)
SUMMED = ("dead_experts", "recompute_flips")  # over layers, where others are averaged


@dataclass(frozen=True)
class Committed:
    """One router's global batch, summed over micro-batches and ranks."""

    name: str
    plan: Plan
    sums: Tensor  # (sums_size(plan),) fp64
    bias_E: Tensor | None

    @property
    def statistics(self) -> Tensor:
        return self.sums[: self.plan.size]

    @property
    def values(self) -> Tensor:
        """(N,) late part of the policies' loss values."""
        return self.sums[self.plan.size : -1]

    @property
    def counts_E(self) -> Tensor:
        return self.statistics[: self.plan.num_experts]

    def of(self, scalar: str) -> Tensor:
        return self.statistics[self.plan.at(scalar)]


def metrics(layers: Sequence[Committed], timeline: Sequence[Timed], step: int, skipped: int) -> dict[str, float]:
    """Flat names to numbers: ``balance/x`` is a mean over layers (SUMMED: a sum), ``balance/layer_03/x`` one."""
    per_layer = [_layer_metrics(layer) for layer in layers]
    named = {f"layer_{i:02d}/{key}": value for i, values in enumerate(per_layer) for key, value in values.items()}
    for key in dict.fromkeys(key for values in per_layer for key in values):
        stacked = torch.stack([values[key] for values in per_layer if key in values])  # not every layer has a bias
        named[key] = stacked.sum() if key in SUMMED else stacked.mean()
    named |= _policy_metrics(layers, timeline, step)
    tokens = torch.stack([layer.of("tokens") for layer in layers])  # one may run twice in each forward, or in none
    named["tokens"] = torch.where(tokens > 0, tokens, tokens.max()).min()
    numbers = torch.stack([value.double() for value in named.values()]).tolist()  # the only wait for the device
    found = {f"balance/{key}": number for key, number in zip(named, numbers, strict=True)}
    # not known where autograd left the meter alone (``backward(inputs=...)``): left out rather than called 0
    found = {key: number for key, number in found.items() if not (key.endswith("ratio") and number != number)}
    if found["balance/recompute_flips"]:
        warnings.warn(FLIPS, stacklevel=3)
    return found | {"balance/skipped_steps": float(skipped)}


def _layer_metrics(layer: Committed) -> dict[str, Tensor]:
    counts_E, tokens = layer.counts_E, layer.of("reached").clamp(min=1)
    found = {
        "maxvio_global": maxvio(counts_E),
        "maxvio_micro_batch": layer.of("maxvio_micro_batch") / layer.of("calls").clamp(min=1),
        "maxvio_sequence": layer.of("maxvio_sequence") / layer.of("sequences").clamp(min=1),
        "cv_global": cv(counts_E),
        "entropy_global": normalized_entropy(counts_E),
        "dead_experts": dead_experts(counts_E).double(),
        "topk_score": layer.of("topk_score") / tokens,
        "recompute_flips": layer.sums[-1],
    }
    if layer.bias_E is not None:
        found["bias_max"] = layer.bias_E.abs().max().double()
    return found


def _policy_metrics(layers: Sequence[Committed], timeline: Sequence[Timed], step: int) -> dict[str, Tensor]:
    """Loss value (1 = balanced), and gradient norm against the language model's at the router over all layers."""
    named: dict[str, Tensor] = {}
    term = -1
    norms = layers[0].plan.norms
    language = torch.stack([layer.statistics[layer.plan.forward_size] for layer in layers]).sum()
    for timed in timeline:
        is_loss = isinstance(timed.policy, AuxLoss)
        term += is_loss
        if not timed.active(step) or isinstance(timed.policy, ExpertBias):
            continue
        values, squares = [], []
        for layer in layers:
            plan, tokens = layer.plan, layer.of("reached").clamp(min=1)
            if is_loss:
                values.append((layer.statistics[plan.values_at + term] + layer.values[term]) / tokens)
            elif isinstance(timed.policy, ZLoss):
                values.append(layer.of("lse_square") / tokens)
            squares.append(layer.statistics[plan.forward_size + 1 + (term if is_loss else len(plan.terms))])
        named[f"policy_{timed.index}/loss"] = torch.stack(values).mean()
        if norms:
            named[f"policy_{timed.index}/gradient_ratio"] = torch.where(
                language > 0, torch.stack(squares).sum() / language, torch.nan
            ).sqrt()
    return named


def fidelity_sums(
    names: Sequence[str], step_fidelity: Sequence[list[tuple[dict[str, Tensor], Tensor]]], counts: Sequence[Tensor]
) -> Tensor:
    """(1 + 3 * names,) what `fidelity` needs of one rank, to be added up over ranks.

    The gradient is linear in f, so its error and cosine follow from f^T G f with G the Gram matrix of a micro-batch.
    """
    sums = torch.zeros(1 + 3 * len(names), dtype=torch.float64, device=counts[0].device if counts else None)
    for micro_batches, counts_E in zip(step_fidelity, counts, strict=True):
        truth_E = load_fractions(counts_E)
        for known, gram_EE in micro_batches:
            terms = [truth_E @ gram_EE @ truth_E]
            for name in names:
                fraction_E = known[name]
                off_E = fraction_E - truth_E
                terms += [off_E @ gram_EE @ off_E, fraction_E @ gram_EE @ truth_E, fraction_E @ gram_EE @ fraction_E]
            sums += torch.stack(terms)
    return sums


def fidelity(names: Sequence[str], sums: Tensor) -> dict[str, dict[str, float]]:
    """Relative error and cosine of each estimator's gradient at the logits against that of the whole step's f."""
    exact, *rest = sums.tolist()
    exact = max(exact, 1e-300)
    found: dict[str, dict[str, float]] = {"relative_error": {}, "cosine": {}}
    for name, error, cross, own in zip(names, rest[::3], rest[1::3], rest[2::3], strict=True):
        found["relative_error"][name] = (max(error, 0.0) / exact) ** 0.5
        found["cosine"][name] = cross / max((exact * max(own, 0.0)) ** 0.5, 1e-300)  # rounding may fall below 0
    return found
