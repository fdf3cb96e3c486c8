"""What a balancer saves and takes back: by the names of routers and policies, with the biases that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..functional.routing import PLACES
from ..policies.expert_bias import ExpertBias
from ..policies.schedule import Schedule
from ..torch_internals import WRAPPED
from .layer_group import Layer, LayerGroup

__all__ = ["VERSION", "keeping_biases", "load_states", "put_biases", "states_of"]

VERSION = 2
ROUNDING = 2.0**-8  # of a bias that went through bf16, as a share of the largest


def _inner(name: str) -> str:
    """A router's name without what wraps the model: DDP, AveragedModel, the compiler.

    >>> _inner("module.blocks.0.gate")
    'blocks.0.gate'
    """
    return ".".join(part for part in name.split(".") if part not in ("module", *WRAPPED))


def keeping_biases(layers: Sequence[Layer]) -> list[ExpertBias]:
    """Policies of biases that are those of these layers, and stay as they are; [] where there are none."""
    place = next((layer.router.traits.bias_place for layer in layers if layer.biases), PLACES[0])
    kinds = dict.fromkeys(tokens for layer in layers for tokens in layer.biases)
    return [ExpertBias(rate=0.0, place=place, tokens=tokens) for tokens in kinds]


@torch.no_grad()
def put_biases(layers: Sequence[Layer], biases: Mapping[str, Mapping[str | None, Tensor]]) -> None:
    """Into the routers of the same names. Raises ConfigError where there are others, before anything is changed.

    ``biases``: name of a router -> what `biases_of` returns.
    """
    known = {_inner(name): of_router for name, of_router in biases.items()}
    other = [layer.name for layer in layers if _inner(layer.name) not in known]
    other += [
        layer.name
        for layer in layers
        if any(len(bias_E) != layer.router.num_experts for bias_E in known.get(_inner(layer.name), {}).values())
    ]
    if other or len(layers) < len(known):
        raise ConfigError(
            expected=f"a copy of the model, with the routers {', '.join(map(repr, list(known)[:3]))}, ...",
            got=f"{len(layers)} routers" + (f", of which {other[0]!r} is another" if other else ""),
            do="pass a copy of the whole balanced model",
        )
    for layer in layers:
        for tokens, bias_E in known[_inner(layer.name)].items():
            layer.biases[tokens].copy_(bias_E)


def _state_names(schedule: Schedule) -> dict[str, str]:
    """Name of a policy -> what its momentum or coefficient is saved under."""
    return {one.name: one.state_name for one in schedule if one.state_name is not None}


def states_of(groups: Sequence[LayerGroup], schedule: Schedule) -> dict[str, dict[str, Any]]:
    """For each router what the next step needs, and what it belongs to: its sizes and its bias."""
    states: dict[str, dict[str, Any]] = {}
    names = _state_names(schedule)
    for group in groups:
        history, coefs = group.history, {at: coef_L.cpu() for at, coef_L in group.coefs.items()}
        for i, layer in enumerate(group.layers):
            biases = {tokens: bias_E.detach().clone() for tokens, bias_E in layer.biases.items()}
            states[layer.name] = {
                "num_experts": layer.router.num_experts,
                "previous_E": None if history.previous_E is None else history.previous_E[i].clone(),
                "ema_E": [(decay, ema_LE[i].clone()) for decay, ema_LE in history.ema_E.items()],
                "momentum_E": [(names[at], momentum_LE[i].clone()) for at, momentum_LE in group.momentum.items()],
                "coefs": [(names[at], float(coef_L[i])) for at, coef_L in coefs.items()],
                "drift_E": None if group.drift is None else group.drift[i].clone(),
                "expert_bias_E": biases.pop(None, None),
                "bias_place": layer.router.traits.bias_place,
            }
            if biases:
                states[layer.name]["class_biases"] = biases
            if group.histories.of_class:
                states[layer.name]["classes"] = {
                    name: {
                        "previous_E": None if past.previous_E is None else past.previous_E[i].clone(),
                        "ema_E": [(decay, ema_LX[i].clone()) for decay, ema_LX in past.ema_E.items()],
                    }
                    for name, past in group.histories.of_class.items()
                }
    return states


def load_states(
    groups: Sequence[LayerGroup], states: Mapping[str, dict[str, Any]], schedule: Schedule, *, strict: bool
) -> list[str]:
    """Puts saved states into the layers of the same names; returns, a line each, what did not fit.

    Raises ConfigError, before anything is changed, where something does not fit and ``strict`` is set.
    """
    layers = {_inner(layer.name): layer for group in groups for layer in group.layers}
    states = {_inner(name): one for name, one in states.items()}
    unfit = _unfit(layers, states, schedule)
    if unfit and strict:
        raise ConfigError(
            expected="the balancer's state of this model, with its routers, policies and biases",
            got="; ".join(unfit[:4]) + (f"; and {len(unfit) - 4} more" if len(unfit) > 4 else ""),
            do="load the checkpoint of this model, its weights first; after a change on purpose "
            "load_state_dict(state, strict=False) takes what fits and returns what it left out",
        )
    for group in groups:
        _load(group, states, schedule, {name for line in unfit if (name := line.partition(": ")[0]) in layers})
    return unfit


def _unfit(layers: Mapping[str, Layer], states: Mapping[str, dict[str, Any]], schedule: Schedule) -> list[str]:
    lines = [f"{name}: not in the state" for name in layers if name not in states]
    lines += [f"{name}: in the state, not in the model" for name in states if name not in layers]
    for name, layer in layers.items():
        if name in states:
            lines += [f"{name}: {what}" for what in _unfit_layer(layer, states[name])]
    known = set(_state_names(schedule).values())
    saved = [rule for state in states.values() for rule, _ in (*state["momentum_E"], *state.get("coefs", ()))]
    rules = dict.fromkeys(rule for rule in saved if rule not in known)
    return lines + [f"policy {rule!r} is in the state, not in the balancer" for rule in rules]


def _unfit_layer(layer: Layer, state: Mapping[str, Any]) -> list[str]:
    if state["num_experts"] != layer.router.num_experts:
        return [f"{state['num_experts']} experts in the state, {layer.router.num_experts} in the model"]
    saved, biases = _saved_biases(state), layer.biases
    for tokens in [one for one, saved_E in saved.items() if one not in biases and bool(saved_E.any())]:
        of, such = ("", "") if tokens is None else (f" of tokens {tokens!r}", f", tokens={tokens!r}")
        return [f"a bias{of} in the state, and no policy that would keep it: add ExpertBias(rate=0.0{such})"]
    both = [(biases[tokens].detach().cpu(), saved_E.cpu()) for tokens, saved_E in saved.items() if tokens in biases]
    there, now = state.get("bias_place", PLACES[0]), layer.router.traits.bias_place
    if there != now and any(bool(saved_E.any()) for _, saved_E in both):
        return [f"a bias that acts with place={there!r} in the state, and ExpertBias with place={now!r}"]
    if layer.router.bias_owner == "the balancer's":
        return []  # beside another library's router: it is in no weights, so this state alone has it
    if not all(_may_be_overwritten(*pair) for pair in both):
        return ["other expert biases in the model's weights than in the state"]
    return []


def _saved_biases(state: Mapping[str, Any]) -> dict[str | None, Tensor]:
    """Those of a router's state, as `biases_of` has them."""
    of_all = state["expert_bias_E"]
    return ({} if of_all is None else {None: of_all}) | state.get("class_biases", {})


def _may_be_overwritten(now_E: Tensor, saved_E: Tensor) -> bool:
    """The model's bias is the saved one, perhaps rounded, or still zero, because its weights came without one."""
    if not bool(now_E.any()):
        return True
    off = (now_E.double() - saved_E.double()).abs().max()
    return bool(off <= ROUNDING * saved_E.double().abs().max())


@torch.no_grad()
def _load(group: LayerGroup, states: Mapping[str, dict[str, Any]], schedule: Schedule, without: set[str]) -> None:
    nothing: dict[str, Any] = {"previous_E": None, "ema_E": [], "momentum_E": [], "expert_bias_E": None}
    names = [_inner(layer.name) for layer in group.layers]
    mine = [nothing if name in without else states.get(name, nothing) for name in names]

    def stacked(rows: Sequence[Tensor | None]) -> Tensor | None:
        known = [row.cpu().double() for row in rows if row is not None]
        if not known:
            return None
        found = iter(known)
        whole = torch.stack([torch.zeros_like(known[0]) if row is None else next(found) for row in rows])
        return whole.to(group.device)

    def keyed(name: str, of: Sequence[Mapping[str, Any]] = mine) -> dict[Any, Tensor]:
        rows = [dict(state[name]) for state in of]
        found = {
            key: stacked([row.get(key) for row in rows]) for key in dict.fromkeys(key for row in rows for key in row)
        }
        return {key: tensor for key, tensor in found.items() if tensor is not None}

    group.history.previous_E = stacked([state["previous_E"] for state in mine])
    group.history.ema_E = keyed("ema_E")
    for name, history in group.histories.of_class.items():
        past = [state.get("classes", {}).get(name, nothing) for state in mine]
        history.previous_E, history.ema_E = stacked([one["previous_E"] for one in past]), keyed("ema_E", past)
    momenta = keyed("momentum_E")
    group.momentum = {at: momenta[name] for at, name in _state_names(schedule).items() if name in momenta}
    group.drift = stacked([state.get("drift_E") for state in mine])
    group.coefs = {}
    for at, rule in schedule.self_setting:
        coef_L = group.coefficients(at.name, rule)
        rows = [dict(state.get("coefs", ())).get(at.state_name) for state in mine]
        known = [rule.start if row is None else min(max(row, rule.limits[0]), rule.limits[1]) for row in rows]
        group.coefs[at.name] = coef_L.new_tensor(known)
    for layer, state in zip(group.layers, mine, strict=True):
        biases = layer.biases
        for tokens, saved_E in _saved_biases(state).items():
            if tokens in biases:
                biases[tokens].copy_(saved_E)
