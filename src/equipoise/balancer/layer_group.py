"""Layers that measure alike, as one: tensors of (L, ...), so that operations of a micro-batch do not grow with L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd.router_state import Meter, clear_slots, gathered, overwrite
from ..autograd.sequence_shards import Late
from ..autograd.spec import Plan
from ..autograd.token_layout import TokenPlacement
from ..devices import sent
from ..policies.estimators import LoadHistory
from ..policies.expert_bias import ExpertBias
from ..policies.switch import Timed

__all__ = ["Bank", "Bound", "Layer", "banks_of"]


class Bound(NamedTuple):
    """What one micro-batch's backward reads at the routers of a bank."""

    push_LP: Tensor  # pressure per unit of the loss's scale, the count flag left out
    late: list[list[Late]]  # of each router, where sequences are sharded
    placed: list[list[TokenPlacement]]  # of each router of another library: how the tokens lay, for a recompute


@dataclass
class Layer:
    """One router of the model."""

    name: str
    router: Any  # has num_experts, top_k, gate, meter, expert_bias, parameters()
    meter: Meter = field(init=False)
    part: int = 0  # of the model, where it comes in parts (pipeline stages of one rank)
    makes_bias: bool = False  # it had no bias before

    @property
    def trainable(self) -> bool:
        """Whether anything learns from a push; of a router without parameters of its own that is not known: yes."""
        own = [p.requires_grad for p in self.router.parameters()]
        return any(own) or not own


@dataclass
class Bank:
    """L layers of one part and plan with all that the balancer keeps for them. ``step_*`` live for one optimizer step.

    The tensors of each meter stay its own, because compiled graphs hold them; what is done to them is done to all.
    """

    layers: list[Layer]
    plan: Plan
    part: int
    history: LoadHistory = field(default_factory=LoadHistory)
    momentum: dict[int, Tensor] = field(default_factory=dict)  # place in the timeline -> (L, E) of its bias rule
    step_taken: Tensor | None = None  # sum of what forward proposed: stands in where a leaf got no gradient
    step_shift: Tensor | None = None  # what changes in it once the other shards of each sequence are known
    step_values: Tensor | None = None  # (L, N): sum over tokens of E <f, p> of the terms whose f the tap chose
    step_windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # term -> (counts, sequences) so far
    step_fidelity: list[tuple[dict[str, Tensor], Tensor]] = field(default_factory=list)
    step_pushes = False  # a policy asked for a gradient
    step_split = False  # a backward of chosen inputs (zero-bubble schedules): autograd leaves the leaves alone
    counted: Tensor | None = None  # statistics of a counting pass, all ranks
    pools: list[Tensor] | None = None  # its expert ids (N, K) at each layer, for the shuffle control

    @property
    def meters(self) -> list[Meter]:
        return [layer.meter for layer in self.layers]

    @property
    def device(self) -> torch.device:
        return self.layers[0].meter.pressure.device

    def counts(self, statistics_LS: Tensor) -> Tensor:
        """(L, E)"""
        return statistics_LS[:, : self.plan.num_experts]

    def forget_step(self) -> None:
        self.history.forget_step()
        self.step_taken = self.step_shift = self.step_values = self.counted = self.pools = None
        self.step_windows, self.step_fidelity = {}, []
        self.step_pushes = self.step_split = False
        for meter in self.meters:
            meter.leaf.grad = meter.language.grad = meter.pool = None
        clear_slots(self.meters)
        if any(term.kind == "document" for term in self.plan.terms):
            overwrite([meter.bad_documents for meter in self.meters])
        self.release()  # a forgotten tap may not push with what the last step left
        count_P = torch.zeros(self.plan.pressure_size, dtype=torch.float64, device=self.device)
        count_P[-1] = 1.0  # counting needs no tap
        overwrite([meter.written for meter in self.meters], [count_P] * len(self.layers))

    def press(self, bound: Bound, scale: Tensor, *, count: bool) -> None:
        """Writes what ``bind`` gave, for this scale of the loss; ``count=False``: push again, count nothing."""
        push_LP = bound.push_LP * scale.to(device=bound.push_LP.device, dtype=torch.float64).reshape(())
        rows = torch.cat([push_LP, push_LP.new_full((len(push_LP), 1), float(count))], dim=1).unbind()
        for meter, late, placed in zip(self.meters, bound.late, bound.placed, strict=True):
            meter.late, meter.placed_late = late, placed
        overwrite([meter.written for meter in self.meters], rows)

    def release(self) -> None:
        """No push and no counting until the next tap: another backward over the same graph adds nothing."""
        overwrite([meter.written for meter in self.meters])
        for meter in self.meters:
            meter.late, meter.placed_late = [], []

    def move_biases(self, timeline: Sequence[Timed], counts_LE: Tensor, step: int, keep: Tensor | None = None) -> None:
        """The expert biases after a step, in place; of a frozen router it stays: other experts would answer (B48).

        ``keep``: a scalar that is False where the step turns out to be bad; None: it is known to be good.
        """
        rows = [i for i, layer in enumerate(self.layers) if layer.trainable]
        for place, timed in enumerate(timeline):
            if rows and isinstance(timed.policy, ExpertBias) and timed.active(step):
                bias_LE = gathered([layer.router.expert_bias for layer in self.layers], counts_LE.device)
                old_LE = self.momentum.get(place, torch.zeros_like(counts_LE))
                new_LE, momentum_LE = timed.policy.step(bias_LE, counts_LE, old_LE, step)
                if len(rows) < len(self.layers):
                    own = sent([layer.trainable for layer in self.layers], old_LE.device).unsqueeze(1) > 0
                    momentum_LE = torch.where(own, momentum_LE, old_LE)
                if keep is not None:
                    new_LE, momentum_LE = torch.where(keep, new_LE, bias_LE), torch.where(keep, momentum_LE, old_LE)
                if timed.policy.rule == "momentum":
                    self.momentum[place] = momentum_LE
                new = new_LE.unbind()
                overwrite([self.layers[i].router.expert_bias for i in rows], [new[i] for i in rows])

    def biases(self) -> Tensor | None:
        """(L, E), NaN for a layer without; None where no layer has one."""
        found = [layer.router.expert_bias for layer in self.layers]
        if all(bias_E is None for bias_E in found):
            return None
        nan_E = torch.full((self.plan.num_experts,), torch.nan, device=self.device)
        return gathered([nan_E if bias_E is None else bias_E for bias_E in found], self.device)


def banks_of(layers: Sequence[Layer]) -> list[Bank]:
    """The layers of each part, plan and device, in order, ready for a step."""
    banks: dict[tuple[int, Plan, torch.device], Bank] = {}
    for layer in layers:
        key = (layer.part, layer.meter.plan, layer.meter.leaf.device)
        banks.setdefault(key, Bank([], layer.meter.plan, layer.part)).layers.append(layer)
    for bank in banks.values():
        bank.forget_step()
    return list(banks.values())
