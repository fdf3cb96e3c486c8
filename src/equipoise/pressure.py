"""The start of backward binds: from the scale of the loss and the load known so far to the pressure on every router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ConfigError
from .functional.losses import load_fractions
from .meter import Meter, Placed, Plan, Tables, Taken
from .policies.estimators import ESTIMATORS, LoadHistory
from .policies.expert_bias import ExpertBias
from .policies.losses import AuxLoss, ZLoss, coefficient
from .policies.scopes import Sequences
from .policies.switch import Timed
from .shards import Late, correct

__all__ = ["Bound", "Layer", "MicroStep", "bind", "step_sums", "sums_size"]


class Bound(NamedTuple):
    """What one micro-batch's backward reads at one router."""

    push: Tensor  # pressure per unit of the loss's scale
    late: list[Late]  # where sequences are sharded
    placed: list[Placed]  # of another library's router: how the tokens lay, for a recompute


@dataclass
class Layer:
    """One router with all that the balancer keeps for it. ``step_*`` live for one optimizer step."""

    name: str
    router: Any  # has num_experts, top_k, gate, meter, expert_bias, parameters()
    meter: Meter
    part: int = 0  # of the model, where it comes in parts (pipeline stages of one rank)
    history: LoadHistory = field(default_factory=LoadHistory)
    momentum: dict[int, Tensor] = field(default_factory=dict)  # place in the timeline -> momentum of its bias rule
    step_taken: Tensor | None = None  # sum of what forward proposed: stands in where the leaf got no gradient
    step_shift: Tensor | None = None  # what changes in it once the other shards of each sequence are known
    step_values: Tensor | None = None  # sum over tokens of E <f, p> of the terms whose f the tap chose
    step_windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # term -> (counts, sequences) so far
    step_fidelity: list[tuple[dict[str, Tensor], Tensor]] = field(default_factory=list)
    counted: Tensor | None = None  # statistics of a counting pass, all ranks
    pool: list[Tensor] | None = None  # its expert ids (N, K), for the shuffle control

    @property
    def trainable(self) -> bool:
        return any(p.requires_grad for p in self.router.parameters())

    def forget_step(self) -> None:
        self.history.forget_step()
        self.step_taken = self.step_shift = self.step_values = self.counted = self.pool = None
        self.step_windows, self.step_fidelity = {}, []
        self.meter.leaf.grad = None
        self.meter.pool = None
        self.meter.clear_slots()
        self.release()  # a forgotten tap may not push with what the last step left
        self.meter.pressure.data[-1] = 1.0  # counting needs no tap

    def press(self, bound: Bound, scale: Tensor, *, count: bool) -> None:
        """Writes what ``bind`` gave, for this scale of the loss; ``count=False``: push again, count nothing."""
        push = bound.push * scale.to(device=bound.push.device, dtype=torch.float64).reshape(())
        self.meter.late, self.meter.placed_late = bound.late, bound.placed
        # .data: a late write that keeps the address and does not trip autograd's version counter
        self.meter.pressure.data.copy_(torch.cat([push, push.new_full((1,), float(count))]))

    def move_bias(self, timeline: Sequence[Timed], counts_E: Tensor, step: int) -> None:
        """The expert bias after a step, in place; of a frozen router it stays, or other experts would answer (B48)."""
        if not self.trainable:
            return
        for place, timed in enumerate(timeline):
            if isinstance(timed.policy, ExpertBias) and timed.active(step):
                momentum_E = self.momentum.get(place, torch.zeros_like(counts_E))
                bias_E, self.momentum[place] = timed.policy.step(self.router.expert_bias, counts_E, momentum_E, step)
                self.router.expert_bias.copy_(bias_E)

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs: previous and ema loads, bias momentum."""
        history = self.history
        own_E = getattr(self.router, "own_bias", None)  # of another library's router: no checkpoint of the model has it
        return {
            "previous_E": history.previous_E,
            "ema": list(history.ema_E.items()),
            "momentum": sorted(self.momentum.items()),
            "own_bias_E": None if own_E is None else own_E.clone(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        history, device = self.history, self.meter.pressure.device
        history.previous_E = None if state["previous_E"] is None else state["previous_E"].to(device)
        history.ema_E = {decay: ema_E.to(device) for decay, ema_E in state["ema"]}
        self.momentum = {place: momentum_E.to(device) for place, momentum_E in state["momentum"]}
        if state.get("own_bias_E") is not None:
            self.router.own_bias = state["own_bias_E"].to(device, copy=True)

    def release(self) -> None:
        """No push and no counting until the next tap: another backward over the same graph adds nothing."""
        self.meter.pressure.data.zero_()
        self.meter.late, self.meter.placed_late = [], []


@dataclass(frozen=True)
class MicroStep:
    """What holds for all layers of one micro-batch."""

    step: int  # optimizer steps committed so far
    number: int  # 1 = the first micro-batch of this step
    reduction: str  # "mean": losses are means, averaged over micro-batches; "sum": they add up to the step's loss
    declared_tokens: float | None  # valid router tokens of the whole step, all ranks
    declared_micro_batches: int | None
    ranks: int
    rank: int


def bind(
    layer: Layer,
    timeline: Sequence[Timed],
    proposed: Taken,
    summed: Sequence[Tables],
    global_E: Tensor,
    micro: MicroStep,
    scale: Tensor,
    estimators: Sequence[str],
) -> Bound:
    """Turns policies into pressure on one router, per unit of the loss's scale, and adds the micro-batch to the step.

    Args:
        summed: its tables over all shards, one per call; empty where sequences are whole.
        global_E: its counts, summed over ranks where a policy asked for it.
        scale: d(step's loss) / d(this micro-batch's loss): 1/M, GradScaler's scale, ...
        estimators: names whose f is kept to be compared with ``exact`` once the step's load is known.
    """
    plan = layer.meter.plan
    layer.history.propose(global_E)
    taken, own_E, late = correct(plan, proposed, summed)
    layer.step_taken = _plus(layer.step_taken, proposed.statistics)
    if summed:
        layer.step_shift = _plus(layer.step_shift, taken - proposed.statistics)
    if layer.step_values is None:
        layer.step_values = torch.zeros(len(plan.terms), dtype=torch.float64, device=taken.device)
    unit = _unit(layer, taken, micro)
    rows = torch.zeros(len(plan.terms), plan.num_experts, dtype=torch.float64, device=taken.device)
    factors = torch.zeros(len(plan.terms) + 1, dtype=torch.float64, device=taken.device)  # the last is the z-loss
    if layer.trainable:
        term = -1
        for timed in timeline:
            term += isinstance(timed.policy, AuxLoss)
            if not timed.active(micro.step):
                continue
            match timed.policy:
                case AuxLoss() as policy:
                    push = unit * coefficient(policy, micro.step) * plan.num_experts
                    rows[term], factors[term] = _bind_term(layer, policy, term, (taken, own_E), push, micro)
                case ZLoss() as policy:
                    factors[-1] += unit * coefficient(policy, micro.step)
    if estimators:
        known = {name: _fraction(layer, name, 0.9, micro.number) for name in estimators}
        weight = unit * scale.to(device=taken.device, dtype=torch.float64).reshape(())
        layer.step_fidelity.append((known, proposed.gram_EE * weight.square()))
    return Bound(torch.cat([rows.flatten(), factors]), late, proposed.placed)


def _unit(layer: Layer, taken: Tensor, micro: MicroStep) -> Tensor:
    """1 / T, times M where losses are means: with the scale (1/M, ...) what each token's gradient is multiplied by.

    T counts the tokens that this layer sees in the step: a layer that runs twice per micro-batch sees each twice.
    """
    plan = layer.meter.plan
    tokens, calls = taken[plan.at("tokens")], taken[plan.at("calls")]
    if micro.declared_tokens is not None:
        step_tokens: Tensor | float = micro.declared_tokens * calls.clamp(min=1)
        micro_batches: Tensor | float = (micro.declared_micro_batches or 1) * micro.ranks
    elif layer.counted is not None:
        step_tokens = layer.counted[plan.at("tokens")]
        micro_batches = layer.counted[plan.at("calls")] / calls.clamp(min=1)  # a layer may run twice per micro-batch
    else:
        step_tokens, micro_batches = tokens, 1.0
    if micro.reduction == "sum":
        micro_batches = 1.0
    total = torch.as_tensor(step_tokens, dtype=torch.float64, device=taken.device)
    return micro_batches / total.clamp(min=1) * (tokens > 0)


def _bind_term(
    layer: Layer, policy: AuxLoss, term: int, seen: tuple[Tensor, Tensor], push: Tensor, micro: MicroStep
) -> tuple[Tensor, Tensor]:
    """(row (E,), factor) of one balance loss: a row for an f chosen here, a factor for one that forward measured.

    ``seen``: the statistics of this micro-batch, and the counts of its sequences over all their shards.
    """
    plan, (taken, own_E) = layer.meter.plan, seen
    zero_E = torch.zeros(plan.num_experts, dtype=torch.float64, device=taken.device)
    probs_E = taken[plan.num_experts : 2 * plan.num_experts]
    assert layer.step_values is not None
    match policy.scope:
        case Sequences(n):
            fraction_E, late = _window(layer, term, n, taken, own_E)
            value = plan.num_experts * (fraction_E * probs_E).sum() - taken[plan.values_at + term]
            layer.step_values[term] += torch.where(late, value, 0.0)
            return torch.where(late, push * fraction_E, zero_E), torch.where(late, 0.0, push)
        case "sequence" | "document" | "micro_batch":
            return zero_E, push
        case "data_parallel":
            assert layer.history.current_E is not None
            fraction_E = load_fractions(layer.history.current_E)
        case "shuffle":
            fraction_E = _shuffled(layer, taken, micro)
        case _:
            fraction_E = _fraction(layer, policy.estimator, policy.decay, micro.number)
    layer.step_values[term] += plan.num_experts * (fraction_E * probs_E).sum()
    return push * fraction_E, torch.zeros_like(push)


def _fraction(layer: Layer, estimator: str, decay: float, number: int) -> Tensor:
    """f under an estimator; zero (no push, value 0) while there is nothing to estimate from."""
    if estimator not in ESTIMATORS:
        raise ConfigError(expected="a known estimator", got=repr(estimator), do=f"choose of {sorted(ESTIMATORS)}")
    fraction_E = ESTIMATORS[estimator](layer.history, decay, number)
    if fraction_E is None:
        return torch.zeros(layer.meter.plan.num_experts, dtype=torch.float64, device=layer.meter.pressure.device)
    return fraction_E


def _window(layer: Layer, term: int, n: int, taken: Tensor, counts_E: Tensor) -> tuple[Tensor, Tensor]:
    """(f of the running window of n sequences (E,), whether the window is wider than this micro-batch).

    No branch on a tensor's value: a GPU is not made to wait.
    """
    plan = layer.meter.plan
    rows = taken[plan.at("rows")] / taken[plan.at("calls")].clamp(min=1)
    before_E, seen = layer.step_windows.get(term, (torch.zeros_like(counts_E), torch.zeros_like(rows)))
    starts = seen >= n
    window_E, seen = counts_E + torch.where(starts, 0.0, before_E), rows + torch.where(starts, 0.0, seen)
    layer.step_windows[term] = (window_E, seen)
    return load_fractions(window_E), rows < n


def _shuffled(layer: Layer, taken: Tensor, micro: MicroStep) -> Tensor:
    """f of as many random tokens of the global batch as this micro-batch has, without replacement (table 2)."""
    plan = layer.meter.plan
    if not layer.pool:  # one micro-batch: any such draw is the whole of it; more raises in exact's words
        return _fraction(layer, "exact", 0.0, micro.number)
    ids_NK = torch.cat(layer.pool)
    draw = (micro.number - 1) * micro.ranks + micro.rank + 1
    generator = torch.Generator().manual_seed(1_000_003 * micro.step + draw)  # leaves the model's stream alone
    size = taken[plan.at("tokens")]
    if plan.micro_sequences is not None:  # several micro-batches in this pass
        size = size * (plan.micro_sequences / taken[plan.at("rows")].clamp(min=plan.micro_sequences))
    drawn = torch.randperm(len(ids_NK), generator=generator)[: int(size)]
    counts_E = torch.bincount(ids_NK[drawn.to(ids_NK.device)].flatten(), minlength=plan.num_experts)
    return load_fractions(counts_E[: plan.num_experts])


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def sums_size(plan: Plan) -> int:
    """Statistics, late values of the terms, choices that a recompute changed."""
    return plan.size + len(plan.terms) + 1


def step_sums(layer: Layer) -> Tensor:
    """(sums_size,): what the leaf collected, or what forward proposed where autograd left the leaf alone.

    It does under ``backward(inputs=...)`` and in the halves of a zero-bubble schedule, for all micro-batches or some.
    """
    plan, leaf = layer.meter.plan, layer.meter.leaf
    counted = torch.zeros_like(leaf.detach()) if leaf.grad is None else leaf.grad
    flips = counted.new_zeros(1)
    if layer.step_taken is not None:
        unknown = layer.step_taken.new_full((plan.size - plan.forward_size,), torch.nan)  # norms
        taken, calls = torch.cat([layer.step_taken, unknown]), plan.at("calls")
        changed = (counted - taken)[: plan.num_experts].abs().sum() / 2
        flips = torch.where(counted[calls] == taken[calls], changed, 0.0).reshape(1)
        counted = torch.where(counted[calls] < taken[calls], taken, counted)
        if layer.step_shift is not None:
            counted = counted + torch.cat([layer.step_shift, torch.zeros_like(unknown)])
    values = layer.step_values if layer.step_values is not None else counted.new_zeros(len(plan.terms))
    return torch.cat([counted, values, flips])
