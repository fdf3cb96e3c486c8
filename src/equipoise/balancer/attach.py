"""Finds a model's routers and gives each a meter, after the policies were checked against all of them."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..autograd.router_state import Meter
from ..autograd.spec import LocalTerm, Plan
from ..errors import ConfigError, StateError
from ..external.discovery import find_external_routers
from ..external.no_router import no_router
from ..external.own_loss import OwnLoss
from ..policies.expert_bias import ExpertBias
from ..policies.losses import AuxLoss, ZLoss
from ..policies.switch import Timed
from .degenerate import check_degenerate
from .layer_group import Layer

__all__ = ["attach", "detach", "part_of", "unbalanced_routers", "undo"]


def _routers(
    parts: Sequence[nn.Module], example: Mapping[str, Any] | None, *, look: bool
) -> list[tuple[int, str, Any]]:
    """(part, name, router): ours by what they have (``layers`` is no lower floor), others by what they return."""
    found: list[tuple[int, str, Any]] = []
    try:
        for i, part in enumerate(parts):
            _check_offload(part)
            ours = [(name, m) for name, m in part.named_modules() if hasattr(m, "meter") and hasattr(m, "num_experts")]
            found += [(i, name, router) for name, router in ours or find_external_routers(part, example, look=look)]
    except BaseException:
        _unhook(router for _, _, router in found)
        raise
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
) -> tuple[list[Layer], OwnLoss]:
    """(a meter for every router, what was switched off), after the policies were checked against all of them.

    Without a policy nothing is switched off, and nothing refused that could only not be pushed.
    ``may_be_empty``: a pipeline stage without MoE layers is one of several.
    """
    _check_options(micro_sequences)
    routers = _routers(parts, example, look=not timed)
    if not routers and not may_be_empty:
        raise no_router(parts, example)
    _check_free(routers)
    own_loss = OwnLoss()
    layers = [Layer(name, r, part=part, makes_bias=r.expert_bias is None) for part, name, r in routers]
    try:
        _check_routers(routers, timed)
        check_degenerate(routers, timed)
        terms = tuple(_term(t.policy, micro_sequences) for t in timed if isinstance(t.policy, AuxLoss))
        norms = gradient_norms and bool(timed) and all(getattr(r, "measures_norms", True) for _, _, r in routers)
        for layer in layers:
            plan = Plan(
                *(layer.router.num_experts, layer.router.top_k, layer.router.gate),
                terms,
                any(isinstance(t.policy, ZLoss) for t in timed),
                norms,
                micro_sequences,
                measure_estimators,
                shards,
                getattr(layer.router, "weights", None),
                getattr(layer.router, "idle", 0),
                looks=not timed,
            )
            layer.meter = Meter(plan, _device(layer.router), layer.name)
        if any(isinstance(t.policy, ExpertBias) for t in timed):
            # a bias that was there is taken over last: what is refused before has changed nothing
            for layer in sorted(layers, key=lambda layer: not layer.makes_bias):
                layer.router.enable_selection_bias()
        for part in {part for part, _, router in routers if timed and hasattr(router, "batch_context")}:
            own_loss.switch_off(parts[part])
        if timed:
            _warn_of_frozen(layers)
        for layer in layers:
            layer.router.meter = layer.meter
    except BaseException:
        undo(layers, own_loss)
        _unhook(router for _, _, router in routers)
        raise
    return layers, own_loss


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


def detach(layers: Sequence[Layer], own_loss: OwnLoss) -> None:
    """The model is as it was, but for a bias that it chooses with: other experts would answer without it."""
    for layer in layers:
        layer.router.meter = None
    own_loss.restore()


def undo(layers: Sequence[Layer], own_loss: OwnLoss) -> None:
    """After an error: also a bias that was added goes again."""
    for layer in layers:
        if layer.makes_bias:
            setattr(layer.router, "own_bias" if hasattr(layer.router, "own_bias") else "expert_bias", None)
    detach(layers, own_loss)


def _unhook(routers: Iterable[Any]) -> None:
    """Routers that were found and never tied leave hooks of their layouts behind."""
    found = (getattr(router, "batch_context", None) for router in routers)
    for context in {id(context): context for context in found if context is not None}.values():
        context.remove()


def _check_offload(part: nn.Module) -> None:
    """Parameters that accelerate loads for each forward and drops again are nowhere to be measured or moved."""
    if any(getattr(module, "_hf_hook", None) is not None for module in part.modules()):
        away = [name for name, p in part.named_parameters() if p.is_meta]
        if away:
            raise ConfigError(
                expected="a model whose parameters lie on devices",
                got=f"{away[0]!r} and {len(away) - 1} more, which accelerate loads from CPU or disk for each forward",
                do="load it without offload: device_map='auto' with max_memory= of GPUs that hold all of it, or "
                "device_map={'': 0}; where memory lacks, quantise what is frozen or shard with FSDP",
            )


def _check_free(routers: Sequence[tuple[int, str, Any]]) -> None:
    for _, name, router in routers:
        if router.meter is not None:
            raise StateError(
                expected="one balancer per model",
                got=f"router {name!r} already has one",
                do="pass all policies to one Balancer, or call remove() on the first",
            )


def _check_routers(routers: Sequence[tuple[int, str, Any]], timed: Sequence[Timed]) -> None:
    biases = [t.policy for t in timed if isinstance(t.policy, ExpertBias)]
    has_z_loss = any(isinstance(t.policy, ZLoss) for t in timed)
    for _, name, router in routers:
        for policy in biases:
            policy.check_gate(router.gate, router.num_experts)
        if has_z_loss and not getattr(router, "returns_logits", True):
            raise ConfigError(
                expected="router logits for ZLoss",
                got=f"router {name!r}, which returns probabilities: the logsumexp of their logarithms is always 0",
                do="leave ZLoss out for this model",
            )
        if (
            timed
            and router.expert_bias is not None
            and not biases
            and any(p.requires_grad for p in router.parameters())
        ):
            raise ConfigError(
                expected="a policy for the expert bias that this model chooses with",
                got=f"a bias in router {name!r} that nobody moves while the router learns",
                do="add ExpertBias(), or ExpertBias(rate=0.0) to keep it as it is; Balancer(model, []) only looks",
            )


def _check_options(micro_sequences: int | None) -> None:
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
