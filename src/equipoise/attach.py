"""Finds a model's routers and gives each a meter, after the policies were checked against all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .errors import ConfigError, StateError
from .meter import LocalTerm, Meter, Plan
from .policies.expert_bias import ExpertBias
from .policies.losses import AuxLoss, ZLoss
from .policies.switch import Timed
from .pressure import Layer

__all__ = ["attach"]


def _routers(model: nn.Module) -> list[tuple[str, Any]]:
    """By what a router has, not by its class: ``layers`` is no lower floor than this."""
    return [(name, m) for name, m in model.named_modules() if hasattr(m, "meter") and hasattr(m, "num_experts")]


def attach(
    model: nn.Module,
    timed: Sequence[Timed],
    measure_estimators: bool,
    gradient_norms: bool,
    micro_sequences: int | None = None,
) -> list[Layer]:
    """A meter for every router, and the policies checked against it before anything is changed."""
    if not timed:
        raise ConfigError(
            expected="at least one policy", got="none", do='for example [AuxLoss(scope="global_batch", coef=1e-2)]'
        )
    if micro_sequences is not None and micro_sequences < 1:
        raise ConfigError(
            expected="sequences_per_micro_batch >= 1",
            got=repr(micro_sequences),
            do="leave it out where each micro-batch is a pass of its own",
        )
    routers = _routers(model)
    if not routers:
        raise ConfigError(
            expected="a model with MoE layers",
            got=f"{type(model).__name__} without a router",
            do="build its feed-forward layers from equipoise.MoE or equipoise.Router",
        )
    biases = [t.policy for t in timed if isinstance(t.policy, ExpertBias)]
    for name, router in routers:
        if router.meter is not None:
            raise StateError(
                expected="one balancer per model",
                got=f"router {name!r} already has one",
                do="pass all policies to one Balancer, or call remove() on the first",
            )
        for policy in biases:
            policy.check_gate(router.gate, router.num_experts)
    terms = tuple(_term(t.policy, micro_sequences) for t in timed if isinstance(t.policy, AuxLoss))
    layers = []
    for name, router in routers:
        if biases:
            router.enable_selection_bias()
        has_z_loss = any(isinstance(t.policy, ZLoss) for t in timed)
        plan = Plan(
            router.num_experts,
            router.top_k,
            router.gate,
            terms,
            has_z_loss,
            gradient_norms,
            micro_sequences,
            measure_estimators,
        )
        router.meter = Meter(plan, next(router.parameters()).device)
        layers.append(Layer(name, router, router.meter))
        layers[-1].forget_step()
    return layers


def _term(policy: AuxLoss, micro_sequences: int | None) -> LocalTerm:
    """Where several micro-batches run as one pass, each is a group of sequences in it."""
    term = policy.term
    if term.kind == "micro_batch" and micro_sequences is not None:
        return LocalTerm("sequences", micro_sequences, term.unbiased)
    return term
