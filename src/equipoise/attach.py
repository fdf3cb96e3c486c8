"""Finds a model's routers and gives each a meter, after the policies were checked against all of them."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .degenerate import check_degenerate
from .discover import find_foreign, switch_off_own_loss
from .errors import ConfigError, StateError
from .meter import LocalTerm, Meter, Plan
from .missing import no_router
from .policies.expert_bias import ExpertBias
from .policies.losses import AuxLoss, ZLoss
from .policies.switch import Timed
from .pressure import Layer

__all__ = ["attach", "detach", "part_of", "unbalanced_routers"]


def _routers(parts: Sequence[nn.Module], example: Mapping[str, Any] | None) -> list[tuple[int, str, Any]]:
    """(part, name, router): ours by what they have (``layers`` is no lower floor), others by what they return."""
    found: list[tuple[int, str, Any]] = []
    for i, part in enumerate(parts):
        ours = [(i, name, m) for name, m in part.named_modules() if hasattr(m, "meter") and hasattr(m, "num_experts")]
        found += ours or [(i, name, router) for name, router in find_foreign(part, example)]
    if len({name for _, name, _ in found}) == len(found):
        return found
    return [(i, f"{i}.{name}", module) for i, name, module in found]


def attach(
    parts: Sequence[nn.Module],
    timed: Sequence[Timed],
    *,
    measure_estimators: bool,
    gradient_norms: bool,
    micro_sequences: int | None,
    shards: int,
    may_be_empty: bool,
    example: Mapping[str, Any] | None = None,
) -> tuple[list[Layer], list[str]]:
    """(a meter for every router, what was switched off), after the policies were checked against all of them.

    ``may_be_empty``: a pipeline stage without MoE layers is one of several.
    """
    _check_options(timed, micro_sequences)
    routers = _routers(parts, example)
    if not routers and not may_be_empty:
        raise no_router(parts, example)
    try:
        _check_routers(routers, timed)
        check_degenerate(routers, timed)
        for _, _, router in routers:
            if any(isinstance(t.policy, ExpertBias) for t in timed):
                router.enable_selection_bias()
    except ConfigError:  # the model is free again
        for layout in {id(at): at for _, _, router in routers if (at := getattr(router, "layout", None))}.values():
            layout.remove()
        raise
    switched_off = []
    for part in {part for part, _, router in routers if hasattr(router, "layout")}:
        switched_off += switch_off_own_loss(parts[part])  # not before all is checked: a refused one changes nothing
    terms = tuple(_term(t.policy, micro_sequences) for t in timed if isinstance(t.policy, AuxLoss))
    gradient_norms = gradient_norms and all(getattr(router, "measures_norms", True) for _, _, router in routers)
    layers = []
    for part, name, router in routers:
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
            shards,
            getattr(router, "weights", None),
            getattr(router, "idle", 0),
        )
        router.meter = Meter(plan, _device(router))
        layers.append(Layer(name, router, router.meter, part))
    _warn_of_frozen(layers)
    return layers, switched_off


def unbalanced_routers(parts: Sequence[nn.Module], layers: Sequence[Layer]) -> list[str]:
    """Names of routers in the model that no balancer has: ours, and others of a class that is balanced here."""
    known = {id(getattr(layer.router, "module", layer.router)) for layer in layers}
    classes = {type(layer.router.module) for layer in layers if hasattr(layer.router, "module")}
    return [
        name
        for part in parts
        for name, module in part.named_modules()
        if id(module) not in known
        and (type(module) in classes or (hasattr(module, "meter") and hasattr(module, "num_experts")))
    ]


def _device(router: Any) -> torch.device:
    return next((p.device for p in router.parameters()), torch.device("cpu"))  # a meter follows the logits anyway


def _warn_of_frozen(layers: Sequence[Layer]) -> None:
    frozen = [layer.name for layer in layers if not layer.trainable]
    if frozen:
        which = "every router of this model is frozen" if len(frozen) == len(layers) else f"frozen: {', '.join(frozen)}"
        warnings.warn(f"{which}; loads are measured, nothing is pushed and no bias moves", stacklevel=4)


def part_of(model: nn.Module, name: str) -> nn.Module:
    """The module of this name, in whatever wraps the model. Raises ConfigError where there is none, or several."""
    found = [n for n, _ in model.named_modules() if n == name or n.endswith(f".{name}")]
    outermost = [n for n in found if not any(n.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        names = ", ".join(found or [n for n, _ in model.named_children()]) or "no parts"
        raise ConfigError(
            expected="part= that names one module of the model",
            got=f"{name!r}; {'it may be any of' if found else 'the model has'} {names}",
            do="pass its name as named_modules() has it",
        )
    return model.get_submodule(outermost[0])


def detach(layers: Sequence[Layer]) -> None:
    for layer in layers:
        layer.router.meter = None


def _check_routers(routers: Sequence[tuple[int, str, Any]], timed: Sequence[Timed]) -> None:
    biases = [t.policy for t in timed if isinstance(t.policy, ExpertBias)]
    has_z_loss = any(isinstance(t.policy, ZLoss) for t in timed)
    for _, name, router in routers:
        if router.meter is not None:
            raise StateError(
                expected="one balancer per model",
                got=f"router {name!r} already has one",
                do="pass all policies to one Balancer, or call remove() on the first",
            )
        for policy in biases:
            policy.check_gate(router.gate, router.num_experts)
        if has_z_loss and not getattr(router, "returns_logits", True):
            raise ConfigError(
                expected="router logits for ZLoss",
                got=f"router {name!r}, which returns probabilities: the logsumexp of their logarithms is always 0",
                do="leave ZLoss out for this model",
            )
        if router.expert_bias is not None and not biases and any(p.requires_grad for p in router.parameters()):
            raise ConfigError(
                expected="a policy for the expert bias that this model chooses with",
                got=f"a bias in router {name!r} that nobody moves while the router learns",
                do="add ExpertBias(), or ExpertBias(rate=0.0) to keep it as it is",
            )


def _check_options(timed: Sequence[Timed], micro_sequences: int | None) -> None:
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


def _term(policy: AuxLoss, micro_sequences: int | None) -> LocalTerm:
    """Where several micro-batches run as one pass, each is a group of sequences in it."""
    term = policy.term
    if term.kind == "micro_batch" and micro_sequences is not None:
        return LocalTerm("sequences", micro_sequences, term.unbiased)
    return term
