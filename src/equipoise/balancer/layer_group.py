"""Layers that measure alike, as one: tensors of (L, ...), so that operations of a micro-batch do not grow with L."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..autograd.protocol import BalancedRouter, has_class_biases
from ..autograd.router_state import RouterState, clear_pending, stack_on, write_all
from ..autograd.sequence_shards import ShardedFractions
from ..autograd.spec import StatsSpec
from ..autograd.token_layout import TokenPlacement
from ..devices import to_device
from ..functional.load_view import target_excess
from ..functional.metrics import maxvio
from ..functional.quantile import pooled_quantile
from ..functional.routing import PLACES
from ..policies.estimators import LoadHistory
from ..policies.expert_bias import ExpertBias
from ..policies.schedule import Schedule
from ..policies.self_setting import Ratio, SelfSetting
from .bias_drift import bias_drift
from .load_histories import LoadHistories

__all__ = ["Layer", "LayerGroup", "MicroBatchCoefficients", "biases_of", "group_layers"]


class MicroBatchCoefficients(NamedTuple):
    """What one micro-batch's backward reads at the routers of a group."""

    coefs_LP: Tensor  # gradient coefficients per unit of the loss's scale, the count flag left out
    sharded: list[list[ShardedFractions]]  # of each router, where sequences are sharded
    placed: list[list[TokenPlacement]]  # of each router of another library: how the tokens lay, for a recompute


def biases_of(router: BalancedRouter) -> dict[str | None, Tensor]:
    """The biases that a router has: under None that of all tokens, under a class's name that of its tokens alone.

    >>> from equipoise import Router
    >>> list(biases_of(Router(dim=8, num_experts=4, top_k=2, selection_bias=True)))
    [None]
    """
    bias_E = router.expert_bias
    of_all: dict[str | None, Tensor] = {} if bias_E is None else {None: bias_E}
    return of_all | dict(router.class_biases) if has_class_biases(router) else of_all


@dataclass
class Layer:
    """One router of the model."""

    name: str
    router: BalancedRouter
    balance_state: RouterState = field(init=False)
    part: int = 0  # of the model, where it comes in parts (pipeline stages of one rank)
    biases_before: tuple[str | None, ...] = ()  # as `biases_of` has them
    bias_place_before: str = PLACES[0]

    @property
    def biases(self) -> dict[str | None, Tensor]:
        """See `biases_of`."""
        return biases_of(self.router)

    @property
    def trainable(self) -> bool:
        """Whether anything learns from a push; of a router without parameters of its own that is not known: yes."""
        own = [p.requires_grad for p in self.router.parameters()]
        return any(own) or not own


@dataclass
class LayerGroup:
    """L layers of one part and spec with all that the balancer keeps for them. ``step_*`` live for one optimizer step.

    The tensors of each router stay its own, because compiled graphs hold them; what is done to them is done to all.
    """

    layers: list[Layer]
    spec: StatsSpec
    part: int
    histories: LoadHistories = field(init=False)
    momentum: dict[str, Tensor] = field(default_factory=dict)  # name of a policy -> (L, E) of its bias rule
    coefs: dict[str, Tensor] = field(default_factory=dict)  # name of a policy -> (L,) where it sets its coefficient
    drift: Tensor | None = None  # (L, E) of the biases of all tokens, see `bias_drift`; None: none has moved
    step_taken: Tensor | None = None  # sum of what forward measured: stands in where backward brought no gradient
    step_shift: Tensor | None = None  # what changes in it once the other shards of each sequence are known
    step_values: Tensor | None = None  # (L, N): sum over tokens of E <f, p> of the terms whose f the tap chose
    step_windows: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # term -> (counts, sequences) so far
    step_errors: list[tuple[dict[str, Tensor], Tensor]] = field(default_factory=list)
    step_pushes = False  # a policy asked for a gradient
    step_split = False  # a backward of chosen inputs (zero-bubble schedules): autograd does not fill the accumulators
    counted: Tensor | None = None  # statistics of a counting pass, all ranks
    pools: list[Tensor] | None = None  # its expert ids (N, K) at each layer, for the shuffle control

    def __post_init__(self) -> None:
        self.histories = LoadHistories(self.spec)

    @property
    def history(self) -> LoadHistory:
        """Of all tokens."""
        return self.histories.whole

    @property
    def states(self) -> list[RouterState]:
        return [layer.balance_state for layer in self.layers]

    @property
    def device(self) -> torch.device:
        return self.layers[0].balance_state.grad_coefs.device

    def counts(self, statistics_LS: Tensor) -> Tensor:
        """(L, E)"""
        return self.spec.counts(statistics_LS)

    def forget_step(self) -> None:
        self.histories.forget_step()
        self.step_taken = self.step_shift = self.step_values = self.counted = self.pools = None
        self.step_windows, self.step_errors = {}, []
        self.step_pushes = self.step_split = False
        for state in self.states:
            state.grad_accumulator.grad = state.lm_grad_accumulator.grad = state.pooled_ids = None
        clear_pending(self.states)
        if self.spec.has_documents:
            write_all([state.bad_documents for state in self.states])
        self.zero_coefficients()  # a forgotten tap may not push with what the last step left
        count_P = torch.zeros(self.spec.coefs_size, dtype=torch.float64, device=self.device)
        self.spec.count_flag(count_P).fill_(1.0)  # counting needs no tap
        write_all([state.grad_coefs_raw for state in self.states], [count_P] * len(self.layers))

    def write_coefficients(self, coefficients: MicroBatchCoefficients, scale: Tensor, *, count: bool) -> None:
        """Writes them for this scale of the loss; ``count=False``: the gradient again, but no counts."""
        unit_LP = coefficients.coefs_LP
        coefs_LP = unit_LP * scale.to(device=unit_LP.device, dtype=torch.float64).reshape(())
        rows = torch.cat([coefs_LP, coefs_LP.new_full((len(coefs_LP), 1), float(count))], dim=1).unbind()
        for state, sharded in zip(self.states, coefficients.sharded, strict=True):
            state.sharded_fractions = sharded
        self.place(coefficients.placed)
        write_all([state.grad_coefs_raw for state in self.states], rows)

    def place(self, placed: list[list[TokenPlacement]]) -> None:
        """How the tokens lay, which a recompute asks before its router's backward."""
        for state, one in zip(self.states, placed, strict=True):
            state.recompute_placements = one

    def zero_coefficients(self) -> None:
        """No push and no counting until the next tap: another backward over the same graph adds nothing."""
        write_all([state.grad_coefs_raw for state in self.states])
        for state in self.states:
            state.sharded_fractions, state.recompute_placements = [], []

    def move_biases(self, schedule: Schedule, summed_LS: Tensor, step: int, keep: Tensor | None = None) -> None:
        """The expert biases after a step, in place; of a frozen router it stays: other experts would answer (B48).

        It stays where recorded ids were dispatched, too: no bias chose them (B31). That of a class is moved by the load
        of its tokens, and stays where the step had none.
        ``summed_LS``: the rows of the step, all ranks. ``keep``: a scalar that is False where the step turns out to be
        bad; None: it is known to be good.
        """
        rows = [i for i, layer in enumerate(self.layers) if layer.trainable]
        for scheduled, policy in schedule.biases:
            if rows and scheduled.active(step):
                of = policy.tokens
                counts_LE = self.counts(summed_LS) if of is None else self.spec.of_class(summed_LS, of)[0]
                biases = [layer.biases[of] for layer in self.layers]
                bias_LE = stack_on(biases, counts_LE.device)
                old_LE = self.momentum.get(scheduled.name, torch.zeros_like(counts_LE))
                rule_LE = self._rule(policy, summed_LS)
                new_LE, momentum_LE = policy.step(bias_LE, counts_LE, old_LE, step, rule_LE)
                moves_L1 = self.spec.scalar(summed_LS, "replayed_choices").unsqueeze(1) == 0
                moves_L1 = moves_L1 if of is None else moves_L1 & (counts_LE.sum(dim=1, keepdim=True) > 0)
                moves_L1 = moves_L1 if keep is None else moves_L1 & keep
                if len(rows) < len(self.layers):
                    own_L = to_device([layer.trainable for layer in self.layers], old_LE.device)
                    moves_L1 = moves_L1 & (own_L.unsqueeze(1) > 0)
                if of is None and new_LE is not bias_LE:  # else its rate is 0
                    self.drift = bias_drift(self.drift, counts_LE, policy.view, moves_L1)
                new_LE = torch.where(moves_L1, new_LE, bias_LE)
                if scheduled.state_name is not None:
                    self.momentum[scheduled.name] = torch.where(moves_L1, momentum_LE, old_LE)
                new = new_LE.unbind()
                write_all([biases[i] for i in rows], [new[i] for i in rows])

    def coefficients(self, name: str, rule: SelfSetting) -> Tensor:
        """(L,) of a policy that sets its coefficient, fp64."""
        if name not in self.coefs:
            self.coefs[name] = torch.full((len(self.layers),), rule.start, dtype=torch.float64, device=self.device)
        return self.coefs[name]

    def move_coefficients(self, schedule: Schedule, summed_LS: Tensor, step: int, keep: Tensor | None = None) -> None:
        """Those that set themselves, after a step; arguments as of `move_biases`.

        A layer without tokens, without a choice of experts, without anything to train, or one of whose gradients is 0
        keeps its own; a policy of one class of tokens knows the load of that class alone.
        """
        spec = self.spec
        for scheduled, policy in schedule.losses:
            if not (isinstance(policy.coef, SelfSetting) and scheduled.active(step)):
                continue
            counts_LE, routed_L = self.counts(summed_LS), spec.scalar(summed_LS, "routed_tokens")
            if policy.tokens is not None:
                counts_LE, _, routed_L = spec.of_class(summed_LS, policy.tokens)
            if isinstance(policy.coef, Ratio):
                own_L, text_L = spec.term_norm(summed_LS, scheduled.term), spec.lm_norm(summed_LS)
                seen_L = torch.where((own_L > 0) & (text_L > 0), own_L / text_L, torch.nan).sqrt()
            else:  # of a replay the load is another router's
                view = spec.terms[scheduled.term].view
                seen_L = maxvio(counts_LE) if view is None else target_excess(view, counts_LE)
                seen_L = torch.where(spec.scalar(summed_LS, "replayed_choices") == 0, seen_L, torch.nan)
            learns_L = to_device([float(layer.trainable) for layer in self.layers], routed_L.device)
            chooses_L = (counts_LE.sum(dim=1) < routed_L * spec.num_experts) & (counts_LE.sum(dim=1) > 0)
            seen_L = torch.where(chooses_L & (learns_L > 0), seen_L, torch.nan)
            old_L = self.coefficients(scheduled.name, policy.coef)
            new_L = policy.coef.after(old_L, seen_L)
            self.coefs[scheduled.name] = new_L if keep is None else torch.where(keep, new_L, old_L)

    def _rule(self, policy: ExpertBias, summed_LS: Tensor) -> Tensor | None:
        """(L, E) the step of a rule that is not of the step's counts alone."""
        if policy.scope == "micro_batch":
            return self._mean_rule(summed_LS, policy.rule)
        if policy.rule != "quantile":
            return None
        offsets_LEB, experts = self.spec.offset_counts(summed_LS), self.spec.num_experts
        choices_L1 = self.counts(summed_LS).sum(dim=1, keepdim=True)  # K a token, unless some were dropped
        tokens_L1 = offsets_LEB[:, 0].sum(dim=1, keepdim=True).clamp(min=1)
        shares = [1 / experts] * experts if policy.view is None else policy.view.shares(experts)
        return pooled_quantile(offsets_LEB, choices_L1 / tokens_L1 * to_device(shares, choices_L1.device))

    def _mean_rule(self, summed_LS: Tensor, rule: str) -> Tensor:
        """(L, E) a bias rule's step, mean over the micro-batches of all ranks that are not empty."""
        spec = self.spec
        micro_batches_L1 = spec.scalar(summed_LS, "nonempty_micro_batches").unsqueeze(1)
        return spec.rule_sums(summed_LS)[:, spec.micro_rules.index(rule)] / micro_batches_L1.clamp(min=1)

    def biases(self) -> Tensor | None:
        """(L, E), NaN for a layer without; None where no layer has one."""
        found = [layer.router.expert_bias for layer in self.layers]
        if all(bias_E is None for bias_E in found):
            return None
        nan_E = torch.full((self.spec.num_experts,), torch.nan, device=self.device)
        return stack_on([nan_E if bias_E is None else bias_E for bias_E in found], self.device)


def group_layers(layers: Sequence[Layer]) -> list[LayerGroup]:
    """The layers of each part, spec and device, in order, ready for a step."""
    groups: dict[tuple[int, StatsSpec, torch.device], LayerGroup] = {}
    for layer in layers:
        key = (layer.part, layer.balance_state.spec, layer.balance_state.grad_accumulator.device)
        groups.setdefault(key, LayerGroup([], layer.balance_state.spec, layer.part)).layers.append(layer)
    for group in groups.values():
        group.forget_step()
    return list(groups.values())
