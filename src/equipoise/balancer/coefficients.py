"""The gradient coefficients of one micro-batch, from the policies, the scale of the loss and the load known so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autograd.router_state import ForwardStats, ShardCounts
from ..autograd.sequence_shards import ShardedFractions, correct_for_shards
from ..devices import to_device
from ..errors import ConfigError, StateError
from ..functional.load_view import seen_load
from ..functional.losses import load_fractions
from ..policies.estimators import ESTIMATORS, shares_at
from ..policies.losses import AuxLoss, EntropyLoss, coefficient
from ..policies.schedule import Schedule
from ..policies.scopes import Sequences
from ..policies.self_setting import SelfSetting
from .class_coefficients import class_coefficients
from .layer_group import LayerGroup, MicroBatchCoefficients

__all__ = ["MicroStep", "micro_batch_coefficients", "tokens_said"]


@dataclass(frozen=True)
class MicroStep:
    """What holds for all layers of one micro-batch."""

    step: int  # optimizer steps committed so far
    number: int  # 1 = the first micro-batch of this step
    reduction: str  # "mean": losses are means, averaged over micro-batches; "sum": they add up to the step's loss
    declared_tokens: float | Mapping[str, float] | None  # valid tokens of the whole step, all ranks; or by router name
    declared_micro_batches: int | None
    ranks: int
    rank: int
    estimators: Sequence[str]  # whose f is kept to be compared with ``exact`` once the step's load is known
    passes: int = 1  # forwards that this micro-batch is made of
    summed: str = "micro_step"  # over ranks: its counts, those of the step so far ("step"), or "none"


def micro_batch_coefficients(
    group: LayerGroup,
    schedule: Schedule,
    measured: ForwardStats,
    summed: Sequence[Sequence[ShardCounts]],
    global_LX: Tensor,
    micro: MicroStep,
    scale: Tensor,
) -> MicroBatchCoefficients:
    """Turns policies into pressure on the routers of a group, per unit of the loss's scale; adds the batch to the step.

    Args:
        summed: of each router its tables over all shards, one per call; empty where sequences are whole.
        global_LX: its loads, summed over ranks as ``micro.summed`` says.
        scale: d(step's loss) / d(this micro-batch's loss): 1/M, GradScaler's scale, ...
    """
    spec = group.spec
    local_LX = group.histories.loads(measured.statistics_LS) if micro.ranks > 1 else global_LX
    if micro.summed == "step" and micro.ranks > 1:
        group.histories.add_micro_step(local_LX, local_LX, global_LX, shares=True)
    else:
        shares = micro.ranks == 1 or (micro.summed == "micro_step" and shares_at(micro.number))
        group.histories.add_micro_step(global_LX, local_LX, shares=shares)
    taken_LS, own_LE, own_tokens_L, sharded = _corrected(group, measured, summed)
    weight_L = _token_weight(group, taken_LS, own_tokens_L, micro)
    trainable = [layer.trainable for layer in group.layers]
    if not all(trainable):
        weight_L = weight_L * to_device(trainable, weight_L.device)
    zero_LE, zero_L = torch.zeros_like(own_LE), torch.zeros_like(weight_L)
    terms: list[tuple[Tensor, Tensor, Tensor]] = []  # of each loss: (row (L, E), factor (L,), deferred value (L,))
    z_L = zero_L
    for scheduled, policy in schedule.terms:
        if not scheduled.active(micro.step):
            terms.append((zero_LE, zero_L, zero_L))
            continue
        coef: Tensor | float = coefficient(policy, micro.step)
        group.step_pushes |= coef > 0
        if isinstance(policy.coef, SelfSetting):
            coef, group.step_pushes = group.coefficients(scheduled.name, policy.coef), True
        if isinstance(policy, EntropyLoss):
            terms.append((zero_LE, weight_L * coef, zero_L))
        else:
            push_L = weight_L * (coef * spec.num_experts)
            terms.append(_term_coefficients(group, policy, scheduled.term, (taken_LS, own_LE), push_L, micro))
    for scheduled, policy in schedule.z_losses:
        if scheduled.active(micro.step):
            coef = coefficient(policy, micro.step)
            z_L = z_L + weight_L * coef
            group.step_pushes |= coef > 0
    rows, factors, values = zip(*terms, strict=True) if terms else ((), (), ())
    group.step_values = _plus(group.step_values, torch.stack(values, dim=1) if terms else zero_LE[:, :0])
    if micro.estimators:
        known = {name: _fraction(group, name, 0.9, micro.number) for name in micro.estimators}
        weight_L = weight_L * scale.to(device=weight_L.device, dtype=torch.float64).reshape(())
        assert measured.gram_LEE is not None
        group.step_errors.append((known, measured.gram_LEE * weight_L.square().view(-1, 1, 1)))
    return MicroBatchCoefficients(
        torch.cat([*rows, torch.stack([*factors, z_L], dim=1)], dim=1), sharded, measured.placed
    )


def _corrected(
    group: LayerGroup, measured: ForwardStats, summed: Sequence[Sequence[ShardCounts]]
) -> tuple[Tensor, Tensor, Tensor, list[list[ShardedFractions]]]:
    """Over all shards of a sequence: (statistics (L, S), counts (L, E), tokens (L,) a shard, f for backward)."""
    taken_LS = measured.statistics_LS
    tokens_L = group.spec.scalar(taken_LS, "tokens")
    group.step_taken = _plus(group.step_taken, taken_LS)
    if not any(summed):
        return taken_LS, group.counts(taken_LS), tokens_L, [[] for _ in group.layers]
    whole = [
        correct_for_shards(group.spec, *of_layer)
        if of_layer[2]
        else (of_layer[0], group.counts(of_layer[0]), group.spec.scalar(of_layer[0], "tokens"), [])
        for of_layer in zip(taken_LS, measured.shard_counts, summed, strict=True)
    ]
    statistics, counts, tokens, sharded = zip(*whole, strict=True)
    group.step_shift = _plus(group.step_shift, torch.stack(statistics) - taken_LS)
    return torch.stack(statistics), torch.stack(counts), torch.stack(tokens) / group.spec.shards, list(sharded)


def _token_weight(group: LayerGroup, taken_LS: Tensor, own_tokens_L: Tensor, micro: MicroStep) -> Tensor:
    """(L,) 1 / T, times M where losses are means: with the scale (1/M, ...) the factor of each token's gradient.

    T counts the tokens that a layer sees in the step: one that runs twice per micro-batch sees each twice. Without a
    word each micro-batch weighs the same, with all its shards: ``own_tokens_L`` is the mean of theirs.
    """
    spec = group.spec
    tokens_L, calls_L = spec.scalar(taken_LS, "tokens"), spec.scalar(taken_LS, "calls")
    if micro.declared_tokens is not None:
        step_tokens_L = tokens_said(group, micro.declared_tokens) * _in_a_pass(calls_L, micro.passes)
        micro_batches: Tensor | float = (micro.declared_micro_batches or 1) * micro.ranks
    elif group.counted is not None:
        step_tokens_L = spec.scalar(group.counted, "tokens")
        micro_batches = spec.scalar(group.counted, "calls") / calls_L.clamp(min=1)  # a layer may run twice
    else:
        step_tokens_L, micro_batches = own_tokens_L, 1.0
    if micro.reduction == "sum":
        micro_batches = 1.0
    return micro_batches / step_tokens_L.clamp(min=1) * (tokens_L > 0)


def _in_a_pass(calls_L: Tensor, passes: int) -> Tensor:
    """How often a layer runs in one forward of the model."""
    return (calls_L if passes == 1 else calls_L / passes).clamp(min=1)


def tokens_said(group: LayerGroup, declared: float | Mapping[str, float]) -> Tensor | float:
    """What ``begin_step`` declared for the layers of a group: one number for all, or (L,)."""
    if not isinstance(declared, Mapping):
        return declared
    said = [declared[layer.name] for layer in group.layers]
    return said[0] if len(set(said)) == 1 else to_device(said, group.device)


def _term_coefficients(
    group: LayerGroup, policy: AuxLoss, term: int, seen: tuple[Tensor, Tensor], push_L: Tensor, micro: MicroStep
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, factor, deferred value) of a balance loss: a row for an f chosen here, a factor for one of forward's.

    ``seen``: the statistics of this micro-batch, and the counts of its sequences over all their shards.
    """
    spec, (taken_LS, own_LE), view = group.spec, seen, group.spec.terms[term].view
    if policy.tokens is not None:
        return class_coefficients(group, policy, view, taken_LS, push_L, micro.number)
    probs_LE, zero_L = spec.probs(taken_LS), torch.zeros_like(push_L)
    match policy.scope:
        case Sequences(n):
            fraction_LE, wider_L = _window(group, term, n, taken_LS, own_LE)
            fraction_LE = seen_load(view, fraction_LE)
            value_L = spec.num_experts * (fraction_LE * probs_LE).sum(dim=1) - spec.values(taken_LS)[:, term]
            row_LE = torch.where(wider_L.unsqueeze(1), push_L.unsqueeze(1) * fraction_LE, 0.0)
            return row_LE, torch.where(wider_L, 0.0, push_L), torch.where(wider_L, value_L, 0.0)
        case "sequence" | "document" | "micro_batch":
            return torch.zeros_like(own_LE), push_L, zero_L
        case "data_parallel":
            assert group.history.current_E is not None
            fraction_LE = load_fractions(group.history.current_E)
        case "shuffle":
            fraction_LE = _shuffled(group, taken_LS, micro)
        case _:
            fraction_LE = _fraction(group, policy.estimator, policy.decay, micro.number)
    fraction_LE = seen_load(view, fraction_LE)
    return push_L.unsqueeze(1) * fraction_LE, zero_L, spec.num_experts * (fraction_LE * probs_LE).sum(dim=1)


def _fraction(group: LayerGroup, estimator: str, decay: float, number: int) -> Tensor:
    """f under an estimator (L, E); zero (no push, value 0) while there is nothing to estimate from."""
    if estimator not in ESTIMATORS:
        raise ConfigError(expected="a known estimator", got=repr(estimator), do=f"choose of {sorted(ESTIMATORS)}")
    fraction_LE = ESTIMATORS[estimator](group.history, decay, number)
    if fraction_LE is None:
        return torch.zeros(len(group.layers), group.spec.num_experts, dtype=torch.float64, device=group.device)
    return fraction_LE


def _window(group: LayerGroup, term: int, n: int, taken_LS: Tensor, counts_LE: Tensor) -> tuple[Tensor, Tensor]:
    """(f of the running window of n sequences (L, E), whether the window is wider than this micro-batch (L,)).

    No branch on a tensor's value: a GPU is not made to wait.
    """
    spec = group.spec
    rows_L = spec.scalar(taken_LS, "sequences") / spec.scalar(taken_LS, "calls").clamp(min=1)
    before_LE, seen_L = group.step_windows.get(term, (torch.zeros_like(counts_LE), torch.zeros_like(rows_L)))
    starts_L = seen_L >= n
    window_LE = counts_LE + torch.where(starts_L.unsqueeze(1), 0.0, before_LE)
    group.step_windows[term] = (window_LE, rows_L + torch.where(starts_L, 0.0, seen_L))
    return load_fractions(window_LE), rows_L < n


def _shuffled(group: LayerGroup, taken_LS: Tensor, micro: MicroStep) -> Tensor:
    """f of as many random tokens of the global batch as this micro-batch has, without replacement (table 2): (L, E)."""
    spec = group.spec
    if not group.pools:  # one micro-batch: any such draw is the whole of it; more passes raise in exact's words
        rows = float(spec.scalar(taken_LS, "sequences").max())
        if micro.ranks > 1 or (spec.micro_sequences is not None and rows > spec.micro_sequences):
            raise StateError(
                expected="the tokens of the whole step for scope 'shuffle'",
                got=f"several micro-batches at once ({micro.ranks} ranks, {rows:g} sequences) without a counting pass",
                do="run the step under `with balancer.counting():` first, also where it is one pass",
            )
        return _fraction(group, "exact", 0.0, micro.number)
    draw = (micro.number - 1) * micro.ranks + micro.rank + 1
    size_L = spec.scalar(taken_LS, "tokens")
    if spec.micro_sequences is not None:  # several micro-batches in this pass
        size_L = size_L * (spec.micro_sequences / spec.scalar(taken_LS, "sequences").clamp(min=spec.micro_sequences))
    counts = []
    for ids_NK, size in zip(group.pools, size_L.tolist(), strict=True):
        generator = torch.Generator().manual_seed(1_000_003 * micro.step + draw)  # leaves the model's stream alone
        drawn = torch.randperm(len(ids_NK), generator=generator)[: int(size)].to(ids_NK.device)
        counts.append(torch.bincount(ids_NK[drawn].flatten(), minlength=spec.num_experts)[: spec.num_experts])
    return load_fractions(torch.stack(counts))


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
