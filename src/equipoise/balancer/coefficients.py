"""The gradient coefficients of one micro-batch, from the policies, the scale of the loss and the load known so far."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..autograd.router_state import Tables, Taken
from ..autograd.sequence_shards import Late, correct
from ..devices import sent
from ..errors import ConfigError, StateError
from ..functional.losses import load_fractions
from ..policies.estimators import ESTIMATORS
from ..policies.losses import AuxLoss, ZLoss, coefficient
from ..policies.scopes import Sequences
from ..policies.switch import Timed
from .layer_group import Bank, Bound

__all__ = ["MicroStep", "bind", "tokens_said"]


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


def bind(
    bank: Bank,
    timeline: Sequence[Timed],
    proposed: Taken,
    summed: Sequence[Sequence[Tables]],
    global_LE: Tensor,
    micro: MicroStep,
    scale: Tensor,
) -> Bound:
    """Turns policies into pressure on the routers of a bank, per unit of the loss's scale; adds the batch to the step.

    Args:
        summed: of each router its tables over all shards, one per call; empty where sequences are whole.
        global_LE: the counts, summed over ranks where a policy asked for it.
        scale: d(step's loss) / d(this micro-batch's loss): 1/M, GradScaler's scale, ...
    """
    plan = bank.plan
    bank.history.propose(global_LE)
    taken_LS, own_LE, late = _corrected(bank, proposed, summed)
    unit_L = _unit(bank, taken_LS, micro)
    trainable = [layer.trainable for layer in bank.layers]
    if not all(trainable):
        unit_L = unit_L * sent(trainable, unit_L.device)
    zero_LE, zero_L = torch.zeros_like(own_LE), torch.zeros_like(unit_L)
    terms: list[tuple[Tensor, Tensor, Tensor]] = []  # of each loss: (row (L, E), factor (L,), late value (L,))
    z_L = zero_L
    for timed in timeline:
        match timed.policy:
            case AuxLoss() as policy if timed.active(micro.step):
                coef = coefficient(policy, micro.step)
                push_L = unit_L * (coef * plan.num_experts)
                bank.step_pushes |= coef > 0
                terms.append(_bind_term(bank, policy, len(terms), (taken_LS, own_LE), push_L, micro))
            case AuxLoss():
                terms.append((zero_LE, zero_L, zero_L))
            case ZLoss() as policy if timed.active(micro.step):
                coef = coefficient(policy, micro.step)
                z_L = z_L + unit_L * coef
                bank.step_pushes |= coef > 0
    rows, factors, values = zip(*terms, strict=True) if terms else ((), (), ())
    bank.step_values = _plus(bank.step_values, torch.stack(values, dim=1) if terms else zero_LE[:, :0])
    if micro.estimators:
        known = {name: _fraction(bank, name, 0.9, micro.number) for name in micro.estimators}
        weight_L = unit_L * scale.to(device=unit_L.device, dtype=torch.float64).reshape(())
        assert proposed.gram_LEE is not None
        bank.step_fidelity.append((known, proposed.gram_LEE * weight_L.square().view(-1, 1, 1)))
    return Bound(torch.cat([*rows, torch.stack([*factors, z_L], dim=1)], dim=1), late, proposed.placed)


def _corrected(
    bank: Bank, proposed: Taken, summed: Sequence[Sequence[Tables]]
) -> tuple[Tensor, Tensor, list[list[Late]]]:
    """(statistics (L, S), counts of the sequences (L, E), f to look up in backward), over all shards of a sequence."""
    taken_LS, num_experts = proposed.statistics_LS, bank.plan.num_experts
    bank.step_taken = _plus(bank.step_taken, taken_LS)
    if not any(summed):
        return taken_LS, taken_LS[:, :num_experts], [[] for _ in bank.layers]
    whole = [
        correct(bank.plan, *of_layer) if of_layer[2] else (of_layer[0], of_layer[0][:num_experts], [])
        for of_layer in zip(taken_LS, proposed.tables, summed, strict=True)
    ]
    statistics, counts, late = zip(*whole, strict=True)
    bank.step_shift = _plus(bank.step_shift, torch.stack(statistics) - taken_LS)
    return torch.stack(statistics), torch.stack(counts), list(late)


def _unit(bank: Bank, taken_LS: Tensor, micro: MicroStep) -> Tensor:
    """(L,) 1 / T, times M where losses are means: with the scale (1/M, ...) the factor of each token's gradient.

    T counts the tokens that a layer sees in the step: one that runs twice per micro-batch sees each twice.
    """
    plan = bank.plan
    tokens_L, calls_L = taken_LS[:, plan.at("tokens")], taken_LS[:, plan.at("calls")]
    if micro.declared_tokens is not None:
        step_tokens_L = tokens_said(bank, micro.declared_tokens) * _in_a_pass(calls_L, micro.passes)
        micro_batches: Tensor | float = (micro.declared_micro_batches or 1) * micro.ranks
    elif bank.counted is not None:
        step_tokens_L = bank.counted[:, plan.at("tokens")]
        micro_batches = bank.counted[:, plan.at("calls")] / calls_L.clamp(min=1)  # a layer may run twice
    else:
        step_tokens_L, micro_batches = tokens_L, 1.0
    if micro.reduction == "sum":
        micro_batches = 1.0
    return micro_batches / step_tokens_L.clamp(min=1) * (tokens_L > 0)


def _in_a_pass(calls_L: Tensor, passes: int) -> Tensor:
    """How often a layer runs in one forward of the model."""
    return (calls_L if passes == 1 else calls_L / passes).clamp(min=1)


def tokens_said(bank: Bank, declared: float | Mapping[str, float]) -> Tensor | float:
    """What ``begin_step`` declared for the layers of a bank: one number for all, or (L,)."""
    if not isinstance(declared, Mapping):
        return declared
    said = [declared[layer.name] for layer in bank.layers]
    return said[0] if len(set(said)) == 1 else sent(said, bank.device)


def _bind_term(
    bank: Bank, policy: AuxLoss, term: int, seen: tuple[Tensor, Tensor], push_L: Tensor, micro: MicroStep
) -> tuple[Tensor, Tensor, Tensor]:
    """(row, factor, late value) of a balance loss: a row for an f chosen here, a factor for one that forward measured.

    ``seen``: the statistics of this micro-batch, and the counts of its sequences over all their shards.
    """
    plan, (taken_LS, own_LE) = bank.plan, seen
    probs_LE, zero_L = taken_LS[:, plan.num_experts : 2 * plan.num_experts], torch.zeros_like(push_L)
    match policy.scope:
        case Sequences(n):
            fraction_LE, wider_L = _window(bank, term, n, taken_LS, own_LE)
            value_L = plan.num_experts * (fraction_LE * probs_LE).sum(dim=1) - taken_LS[:, plan.values_at + term]
            row_LE = torch.where(wider_L.unsqueeze(1), push_L.unsqueeze(1) * fraction_LE, 0.0)
            return row_LE, torch.where(wider_L, 0.0, push_L), torch.where(wider_L, value_L, 0.0)
        case "sequence" | "document" | "micro_batch":
            return torch.zeros_like(own_LE), push_L, zero_L
        case "data_parallel":
            assert bank.history.current_E is not None
            fraction_LE = load_fractions(bank.history.current_E)
        case "shuffle":
            fraction_LE = _shuffled(bank, taken_LS, micro)
        case _:
            fraction_LE = _fraction(bank, policy.estimator, policy.decay, micro.number)
    return push_L.unsqueeze(1) * fraction_LE, zero_L, plan.num_experts * (fraction_LE * probs_LE).sum(dim=1)


def _fraction(bank: Bank, estimator: str, decay: float, number: int) -> Tensor:
    """f under an estimator (L, E); zero (no push, value 0) while there is nothing to estimate from."""
    if estimator not in ESTIMATORS:
        raise ConfigError(expected="a known estimator", got=repr(estimator), do=f"choose of {sorted(ESTIMATORS)}")
    fraction_LE = ESTIMATORS[estimator](bank.history, decay, number)
    if fraction_LE is None:
        return torch.zeros(len(bank.layers), bank.plan.num_experts, dtype=torch.float64, device=bank.device)
    return fraction_LE


def _window(bank: Bank, term: int, n: int, taken_LS: Tensor, counts_LE: Tensor) -> tuple[Tensor, Tensor]:
    """(f of the running window of n sequences (L, E), whether the window is wider than this micro-batch (L,)).

    No branch on a tensor's value: a GPU is not made to wait.
    """
    plan = bank.plan
    rows_L = taken_LS[:, plan.at("rows")] / taken_LS[:, plan.at("calls")].clamp(min=1)
    before_LE, seen_L = bank.step_windows.get(term, (torch.zeros_like(counts_LE), torch.zeros_like(rows_L)))
    starts_L = seen_L >= n
    window_LE = counts_LE + torch.where(starts_L.unsqueeze(1), 0.0, before_LE)
    bank.step_windows[term] = (window_LE, rows_L + torch.where(starts_L, 0.0, seen_L))
    return load_fractions(window_LE), rows_L < n


def _shuffled(bank: Bank, taken_LS: Tensor, micro: MicroStep) -> Tensor:
    """f of as many random tokens of the global batch as this micro-batch has, without replacement (table 2): (L, E)."""
    plan = bank.plan
    if not bank.pools:  # one micro-batch: any such draw is the whole of it; more passes raise in exact's words
        rows = float(taken_LS[:, plan.at("rows")].max())
        if micro.ranks > 1 or (plan.micro_sequences is not None and rows > plan.micro_sequences):
            raise StateError(
                expected="the tokens of the whole step for scope 'shuffle'",
                got=f"several micro-batches at once ({micro.ranks} ranks, {rows:g} sequences) without a counting pass",
                do="run the step under `with balancer.counting():` first, also where it is one pass",
            )
        return _fraction(bank, "exact", 0.0, micro.number)
    draw = (micro.number - 1) * micro.ranks + micro.rank + 1
    size_L = taken_LS[:, plan.at("tokens")]
    if plan.micro_sequences is not None:  # several micro-batches in this pass
        size_L = size_L * (plan.micro_sequences / taken_LS[:, plan.at("rows")].clamp(min=plan.micro_sequences))
    counts = []
    for ids_NK, size in zip(bank.pools, size_L.tolist(), strict=True):
        generator = torch.Generator().manual_seed(1_000_003 * micro.step + draw)  # leaves the model's stream alone
        drawn = torch.randperm(len(ids_NK), generator=generator)[: int(size)].to(ids_NK.device)
        counts.append(torch.bincount(ids_NK[drawn].flatten(), minlength=plan.num_experts)[: plan.num_experts])
    return load_fractions(torch.stack(counts))


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more
