"""Finds a model's routers and gives each a state, after the policies were checked against all of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..autograd.protocol import BalancedRouter, has_class_biases, is_balanced_router
from ..autograd.router_state import RouterState
from ..autograd.spec import LossTerm, StatsSpec
from ..errors import ConfigError, StateError
from ..external.discovery import find_external_routers
from ..external.no_router import accelerate_wraps, no_router
from ..external.own_loss import OwnLoss
from ..external.router import ExternalRouter
from ..functional.load_view import LoadView
from ..functional.routing import PLACES
from ..policies.schedule import Schedule
from .degenerate import FoundRouter, check_degenerate
from .layer_group import Layer, biases_of

__all__ = ["attach", "detach", "is_attached", "parts_of", "unbalanced_routers", "undo"]


def _routers(parts: Sequence[nn.Module], example: Mapping[str, Any] | None, *, look: bool) -> list[FoundRouter]:
    """Those that meet the protocol; in a part without one, those of another library, by what they return."""
    found: list[FoundRouter] = []
    try:
        for i, part in enumerate(parts):
            _check_offload(part)
            known = [(i, name, module) for name, module in part.named_modules() if is_balanced_router(module)]
            found += known
            if not known:
                found.extend((i, name, router) for name, router in find_external_routers(part, example, look=look))
    except BaseException:
        _unhook(router for _, _, router in found)
        raise
    if len({name for _, name, _ in found}) == len(found):
        return found
    return [(i, f"{i}.{name}", module) for i, name, module in found]


def attach(
    parts: Sequence[nn.Module],
    schedule: Schedule,
    *,
    measure_estimators: bool,
    gradient_norms: bool,
    micro_sequences: int | None,
    shards: int,
    may_be_empty: bool,
    example: Mapping[str, Any] | None = None,
) -> tuple[list[Layer], OwnLoss]:
    """(every router with its state, what was switched off), after the policies were checked against all of them.

    Without a policy nothing is switched off, and a router is not refused because it could not be balanced.
    ``may_be_empty``: a pipeline stage without MoE layers is one of several.
    """
    _check_options(micro_sequences)
    routers = _routers(parts, example, look=not schedule)
    if not routers and not may_be_empty:
        raise no_router(parts, example)
    _check_free(routers)
    own_loss = OwnLoss()
    layers = [_layer(*found) for found in routers]
    try:
        _check_routers(routers, schedule, shards)
        check_degenerate(routers, schedule)
        norms = _measures_norms(schedule, routers, gradient_norms)
        for layer in layers:
            router, traits = layer.router, layer.router.traits
            spec = StatsSpec(
                *(router.num_experts, router.top_k, router.gate),
                terms=tuple(_term(loss.term, micro_sequences, traits.widths) for _, loss in schedule.terms),
                z_loss=bool(schedule.z_losses),
                norms=norms,
                micro_sequences=micro_sequences,
                gram=measure_estimators,
                shards=shards,
                weights_form=traits.weights_form,
                idle_experts=traits.idle_experts,
                observe_only=not schedule,
                micro_rules=schedule.micro_rules,
                quantile=schedule.pools_quantiles,
                bias_classes=schedule.bias_classes,
                widths=traits.widths,
            )
            layer.balance_state = RouterState(spec, _device(router), layer.name)
        _add_biases(layers, schedule)
        for part in {part for part, _, router in routers if schedule and router.batch_context is not None}:
            own_loss.switch_off(parts[part])
        if schedule:
            _warn_of_frozen(layers)
        for layer in layers:
            layer.router.balance_state = layer.balance_state
    except BaseException:
        undo(layers, own_loss)
        _unhook(router for _, _, router in routers)
        raise
    return layers, own_loss


def _add_biases(layers: Sequence[Layer], schedule: Schedule) -> None:
    """One that was there is taken over last: what is refused before has changed nothing."""
    for layer in sorted(layers, key=lambda layer: bool(layer.biases_before)):
        for tokens in schedule.biased:
            _enable_bias(layer.router, schedule.bias_place, tokens)


def _layer(part: int, name: str, router: BalancedRouter) -> Layer:
    """With what `undo` has to know of its bias."""
    before, place = tuple(biases_of(router)), router.traits.bias_place
    return Layer(name, router, part=part, biases_before=before, bias_place_before=place)


def _measures_norms(schedule: Schedule, routers: Sequence[FoundRouter], wanted: bool) -> bool:
    """Raises ConfigError where a coefficient is set by norms that are not there."""
    without = [name for _, name, router in routers if not router.traits.measures_norms]
    norms = wanted and bool(schedule) and not without
    if schedule.needs_norms and routers and not norms:
        raise ConfigError(
            expected="routers whose gradient norms are measured, for a coefficient Ratio(...)",
            got=f"{without[0]}, where autograd records none" if wanted else "gradient_norms=False",
            do="use a number, or Target(maxvio=0.1)" if wanted else "leave gradient_norms on",
        )
    return norms


def unbalanced_routers(parts: Sequence[nn.Module], layers: Sequence[Layer]) -> list[str]:
    """Names of routers in the model that no balancer has: ours, and others of a class that is balanced here."""
    known = {id(layer.router.module) for layer in layers}
    classes = {type(layer.router.module) for layer in layers}
    return [
        name
        for part in parts
        for name, module in part.named_modules()
        if id(module) not in known and (type(module) in classes or is_balanced_router(module))
    ]


def _device(router: BalancedRouter) -> torch.device:
    return next((p.device for p in router.parameters()), torch.device("cpu"))  # a state follows the logits anyway


def _warn_of_frozen(layers: Sequence[Layer]) -> None:
    frozen = [layer.name for layer in layers if not layer.trainable]
    if frozen:
        which = "every router of this model is frozen" if len(frozen) == len(layers) else f"frozen: {', '.join(frozen)}"
        warnings.warn(f"{which}; loads are measured, nothing is pushed and no bias moves", stacklevel=4)


def parts_of(model: nn.Module | Sequence[nn.Module], name: str | None) -> list[nn.Module]:
    """What is balanced: the model or its parts, or in each of them the module of this name. Raises ConfigError."""
    parts: list[Any] = list(model) if isinstance(model, Iterable) and not isinstance(model, nn.Module) else [model]
    if not parts or not all(isinstance(one, nn.Module) for one in parts):
        raise ConfigError(
            expected="a torch.nn.Module, or a list of the parts that this rank holds of one",
            got=repr(model),
            do="pass the model that you train",
        )
    return parts if name is None else [_part_of(one, name) for one in parts]


def _part_of(model: nn.Module, name: str) -> nn.Module:
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


def is_attached(layers: Sequence[Layer]) -> bool:
    """Whether the routers still have the states of these layers: not after ``remove()``."""
    return all(layer.router.balance_state is layer.balance_state for layer in layers)


def detach(layers: Sequence[Layer], own_loss: OwnLoss) -> None:
    """The model is as it was, but for a bias that it chooses with: other experts would answer without it."""
    for layer in layers:
        mine = getattr(layer, "balance_state", None)  # none yet where attaching failed
        if layer.router.balance_state is mine:  # and not that of a balancer that was made since
            layer.router.balance_state = None
    own_loss.restore()


def undo(layers: Sequence[Layer], own_loss: OwnLoss) -> None:
    """After an error: also a bias that was added goes again."""
    for layer in layers:
        router, before = layer.router, layer.biases_before
        for tokens in [one for one in layer.biases if one not in before]:
            if tokens is None:
                router.disable_selection_bias()
            elif has_class_biases(router):
                router.disable_selection_bias(tokens)
        if before and router.traits.bias_place != layer.bias_place_before:
            _enable_bias(router, layer.bias_place_before, before[0])
    detach(layers, own_loss)


def _unhook(routers: Iterable[BalancedRouter]) -> None:
    """Routers that were found and never tied leave hooks of their layouts behind."""
    for layout in {id(at): at for router in routers if (at := router.batch_context) is not None}.values():
        layout.remove()


def _check_offload(part: nn.Module) -> None:
    """Parameters that accelerate loads for each forward and drops again are nowhere to be measured or moved."""
    if any(map(accelerate_wraps, part.modules())):
        away = [name for name, p in part.named_parameters() if p.is_meta]
        if away:
            raise ConfigError(
                expected="a model whose parameters lie on devices",
                got=f"{away[0]!r} and {len(away) - 1} more, which accelerate loads from CPU or disk for each forward",
                do="load it without offload: device_map='auto' with max_memory= of GPUs that hold all of it, or "
                "device_map={'': 0}; where memory lacks, quantise what is frozen or shard with FSDP",
            )


def _check_free(routers: Sequence[FoundRouter]) -> None:
    for _, name, router in routers:
        if router.balance_state is not None:
            raise StateError(
                expected="one balancer per model",
                got=f"router {name!r} already has one",
                do="pass all policies to one Balancer, or call remove() on the first",
            )


def _check_routers(routers: Sequence[FoundRouter], schedule: Schedule, shards: int) -> None:
    _check_classes(schedule, shards)
    for _, name, router in routers:
        _check_widths(name, router)
        for view in schedule.views:
            (view.of_layer(router.traits.widths) or LoadView()).members(router.num_experts)
        for _, policy in schedule.biases:
            policy.check_gate(router.gate, router.num_experts)
        if schedule.bias_classes and not has_class_biases(router):
            raise _no_class_biases(name, router, schedule.bias_classes[0])
        if schedule.biases:
            _check_place(name, router, schedule.bias_place)
        if any(bias.rule == "quantile" for _, bias in schedule.biases):
            _check_selects(name, router, shards, schedule)
        if schedule.z_losses and not router.traits.returns_logits:
            raise ConfigError(
                expected="router logits for ZLoss",
                got=f"router {name!r}, which returns probabilities: the logsumexp of their logarithms is always 0",
                do="leave ZLoss out for this model",
            )
        if schedule and any(p.requires_grad for p in router.parameters()):
            _check_moved(name, router, schedule)


def _check_moved(name: str, router: BalancedRouter, schedule: Schedule) -> None:
    for tokens in [one for one in biases_of(router) if one not in schedule.biased]:
        of, such = ("", "") if tokens is None else (f" of tokens {tokens!r}", f"tokens={tokens!r}")
        raise ConfigError(
            expected="a policy for the expert bias that this model chooses with",
            got=f"a bias{of} in router {name!r} that nobody moves while the router learns",
            do=f"add ExpertBias({such}), or ExpertBias(rate=0.0{such and f', {such}'}) to keep it as it is; "
            "Balancer(model, []) only looks",
        )


def _check_classes(schedule: Schedule, shards: int) -> None:
    if shards > 1 and (names := [loss.tokens for _, loss in schedule.losses if loss.tokens is not None]):
        raise ConfigError(
            expected="whole sequences for a policy of one class of tokens",
            got=f"tokens={names[0]!r}, and sequences cut over {shards} ranks",
            do="leave tokens out: the load of a class is not added up over parts of a sequence",
        )


def _no_class_biases(name: str, router: BalancedRouter, tokens: str) -> ConfigError:
    return ConfigError(
        expected=f"a router that can have a bias for a class of tokens (equipoise.Router), for tokens={tokens!r}",
        got=f"router {name!r}, a {type(router.module).__name__}, whose bias is one for all tokens",
        do=f"use AuxLoss(tokens={tokens!r}), or ExpertBias() of all tokens",
    )


def _check_selects(name: str, router: BalancedRouter, shards: int, schedule: Schedule) -> None:
    """For the quantile rule, which has to know how the router chose."""
    if not router.traits.selects or router.traits.idle_experts:
        do = "use rule='sign' or 'proportional'"
        if isinstance(router, ExternalRouter) and not router.traits.idle_experts:
            do += ", or set its num_group and topk_group to what it chooses by (both 1: no groups)"
        raise ConfigError(
            expected="a router that says how it chose (its bias, its groups, no dropped choice), for rule='quantile'",
            got=f"router {name!r}, a {type(router.module).__name__}, which does not",
            do=do,
        )
    if shards > 1 and "quantile" in schedule.micro_rules:
        raise ConfigError(
            expected="whole sequences for ExpertBias('quantile', scope='micro_batch'), a control",
            got=f"sequences cut over {shards} ranks",
            do="leave the scope out: the pooled quantile knows no cut",
        )


def _check_place(name: str, router: BalancedRouter, place: str) -> None:
    traits, biases = router.traits, biases_of(router)
    if place not in traits.bias_places:
        whose = f", whose bias is {router.bias_owner}" if biases else ""
        raise ConfigError(
            expected=f"a place where the bias of router {name!r} can act: {', '.join(traits.bias_places)}",
            got=f"ExpertBias(place={place!r}){whose}",
            do="leave place out: the code of such a model or router adds the bias where it always does",
        )
    moved = (
        [one for one in biases.values() if not one.is_meta and bool(one.any())] if traits.bias_place != place else []
    )
    if moved:
        raise ConfigError(
            expected=f"ExpertBias(place={traits.bias_place!r}), where the bias of router {name!r} acts",
            got=f"place={place!r} for a bias that is not zero: other experts would answer",
            do=f"pass place={traits.bias_place!r}, with rate=0.0 to keep the bias as it is; or set it to zero first",
        )


def _enable_bias(router: BalancedRouter, place: str, tokens: str | None) -> None:
    """Routers that know one place alone take no argument."""
    if tokens is not None:
        assert has_class_biases(router)
        router.enable_selection_bias(place, tokens)
    elif place == PLACES[0]:
        router.enable_selection_bias()
    else:
        router.enable_selection_bias(place)


def _check_options(micro_sequences: int | None) -> None:
    if micro_sequences is not None and (type(micro_sequences) is not int or micro_sequences < 1):
        raise ConfigError(
            expected="sequences_per_micro_batch of 1 or more, a whole number",
            got=repr(micro_sequences),
            do="leave it out where each micro-batch is a pass of its own",
        )


def _check_widths(name: str, router: BalancedRouter) -> None:
    widths = router.traits.widths
    if widths is not None and (len(widths) != router.num_experts or not all(0 < one < math.inf for one in widths)):
        raise ConfigError(
            expected=f"expert_widths above 0, one for each of {router.num_experts} experts",
            got=f"{list(widths)} at router {name!r}",
            do="set router.expert_widths to what the experts behind it have, or to None where they are alike",
        )


def _term(term: LossTerm, micro_sequences: int | None, widths: tuple[int, ...] | None) -> LossTerm:
    """As a router with experts of these widths has it. Where several micro-batches run as one pass, each is a group of
    sequences in it."""
    if term.view is not None:
        term = term._replace(view=term.view.of_layer(widths))
    if term.kind == "micro_batch" and micro_sequences is not None:
        return term._replace(kind="sequences", sequences=micro_sequences)
    return term
