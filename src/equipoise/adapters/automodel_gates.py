"""NeMo Automodel's gates: a carrier beside each, what it decides through it; its own balancing off."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError
from ..external.carrier import RouterCarrier
from ..policies.schedule import Schedule
from .plain_state import CHILD, plain_name

__all__ = [
    "BIAS",
    "balance_gate",
    "layers_of",
    "let_go",
    "own_balancing",
    "switch_off",
    "warn_of_untried",
]

BIAS = "e_score_correction_bias"
HOOKS = "_equipoise_hooks"
TOUCHED = ("forward", "_route_scores", "update_bias")  # of the engine's class
GATES = {"softmax": "softmax", "softmax_with_bias": "softmax", "sqrtsoftplus": "sqrt_softplus"}  # others: sigmoid
UNSEEN_AXES = ("tp", "cp", "ep", "pp")
NO_TEST = "no test of equipoise has run it in Automodel"


def layers_of(model: nn.Module) -> dict[str, Any]:
    """Every MoE layer by the name of its gate.

    Raises ConfigError for a gate whose code is not Automodel's own, and for what never ran.
    """
    theirs = importlib.import_module("nemo_automodel.components.moe.layers")
    found: dict[str, Any] = {}
    modules = {plain_name(name): module for name, module in model.named_modules()}
    for name, layer in modules.items():
        if isinstance(layer, theirs.MoE):
            if layer.cp_mesh is not None:
                raise _refused(name, "with context parallelism", f"train without it: {NO_TEST}")
            _check_gate(f"{name}.gate", layer.gate, theirs.Gate)
            found[f"{name}.gate"] = layer
    for name, module in modules.items():
        if hasattr(module, "update_bias") and not any(module is one.gate for one in found.values()):
            raise _other(name, module, " outside of its class MoE")
    if not found:
        raise ConfigError(
            expected="a model with Automodel's MoE layers",
            got=f"a {type(model).__name__} without any",
            do="build one of its own (nemo_automodel.components.models); Balancer takes those of transformers",
        )
    for name, parameter in model.named_parameters():
        axes = getattr(getattr(parameter, "device_mesh", None), "mesh_dim_names", None) or ()
        if unseen := [axis for axis in axes if axis in UNSEEN_AXES]:
            raise _refused(plain_name(name), f"spread over the mesh axis {unseen[0]!r}", f"train with FSDP2: {NO_TEST}")
    return found


def _check_gate(name: str, gate: Any, theirs: type) -> None:
    if not isinstance(gate, theirs):
        raise _other(name, gate, "")
    if changed := [one for one in TOUCHED if getattr(type(gate), one) is not getattr(theirs, one)]:
        raise _other(name, gate, f" with its own {changed[0]}()")
    if CHILD in gate._modules:
        raise ConfigError(
            expected="a model that nothing of equipoise balances yet",
            got=f"{name} with a carrier already",
            do="pass all policies to one AutomodelBalancer, or remove() the first",
        )
    if gate.use_routing_core:
        why = "a graph that is replayed passes the balancer by"
        raise _refused(name, "in a CUDA graph", f"leave 'moe_router' out of cuda_graph.modules: {why}")
    if gate.router_replay is not None:
        raise _refused(name, "with enable_routing_replay", "leave it out: replayed choices are not balanced yet")


def _refused(name: str, how: str, do: str) -> ConfigError:
    return ConfigError(expected="a model of Automodel that equipoise can balance", got=f"{name} {how}", do=do)


def _other(name: str, module: nn.Module, how: str) -> ConfigError:
    kind = type(module)
    return ConfigError(
        expected="Automodel's own Gate",
        got=f"{name}: a {kind.__module__}.{kind.__qualname__}{how}",
        do="put a RouterCarrier into that gate (docs/own-router.md) and make the Balancer yourself",
    )


def balance_gate(layer: Any, *, takes_bias: bool) -> RouterCarrier:
    """Puts a carrier beside a layer's gate and leads what it decides through it. Without a balancer nothing changes."""
    gate = layer.gate
    chooses = getattr(gate, BIAS) is not None and gate.score_func != "softmax"  # which leaves the bias alone
    weighs = gate.router_weight_uses_score_correction_bias
    carrier = RouterCarrier(
        gate,
        num_experts=gate.n_experts,
        top_k=gate.topk,
        gate=GATES.get(gate.score_func, "sigmoid"),
        bias=BIAS if takes_bias and chooses and not weighs else None,
        without_bias="leave router_weight_uses_score_correction_bias out: experts are weighed with that bias too"
        if weighs
        else f"MoEConfig(force_e_score_correction_bias=True) with a score_func other than 'softmax' makes {BIAS}, "
        "which its checkpoints hold",
    )
    told: dict[str, Any] = {}  # of the call under way
    route: Callable[[Tensor], tuple[Tensor, Tensor, Tensor | None]] = gate._route_scores

    @functools.wraps(route)
    def routed(scores_TE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        weights_TK, ids_TK, scores = route(carrier.record(scores_TE))
        layout = TokenLayout(num_sequences=told.get("sequences"), token_mask_T=told.get("mask_T"))
        return carrier.attach(weights_TK, scores_TE, ids_TK, layout), ids_TK, scores

    def read(gate: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
        told["mask_T"] = given[1] if len(given) > 1 else named.get("token_mask")

    def read_layer(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:  # noqa: ARG001
        x = given[0] if given else named["x"]
        told["sequences"] = len(x) if x.dim() == 3 else None  # (T, D): nobody says how they lie

    gate.add_module(CHILD, carrier)
    gate._route_scores = routed
    gate.__dict__[HOOKS] = [
        gate.register_forward_pre_hook(read, with_kwargs=True),
        layer.register_forward_pre_hook(read_layer, with_kwargs=True),
    ]
    return carrier


def let_go(gates: Mapping[str, Any]) -> None:
    """Undoes `balance_gate`."""
    for gate in gates.values():
        gate.__dict__.pop("_route_scores", None)
        gate._modules.pop(CHILD, None)
        for hook in gate.__dict__.pop(HOOKS, ()):
            hook.remove()


def own_balancing(gates: Mapping[str, Any], schedule: Schedule) -> str:
    """What Automodel itself balances by, and what becomes of it beside policies, in words.

    Raises ConfigError for a bias that it has moved, and that would stand still while the gates learn.
    """
    one = next(iter(gates.values()))
    ours = f"as AuxLoss('micro_batch', coef={one.aux_loss_coeff:g})"  # measured: docs/coefficients.md
    told = [f"aux_loss_coeff {one.aux_loss_coeff:g}, {ours}"] if one.aux_loss_coeff > 0 else []
    moves = one.bias_update_factor > 0
    if moves:
        told.append(f"{BIAS} moved by {one.bias_update_factor:g}")
    if not schedule:
        return f"on, as it was ({', '.join(told)})" if told else "none"
    for name, gate in gates.items():
        if moves and not schedule.biases and bool(getattr(gate, BIAS).any()):
            raise ConfigError(
                expected=f"a policy that moves {BIAS}, which the gates choose with",
                got=f"{name}.{BIAS} that is not zero, and Automodel's own updates switched off",
                do='add ExpertBias() ("loss-free"), or ExpertBias(rate=0.0) to keep it as it is',
            )
    return f"off (it was {', '.join(told)})" if told else "none"


def switch_off(gates: Mapping[str, Any]) -> None:
    """Automodel's own loss and its updates of the bias."""
    for gate in gates.values():
        gate.aux_loss_coeff = gate.bias_update_factor = 0.0  # read at every call
        gate.update_bias = _leave  # some models call it whatever the factor is
        gate.e_score_correction_bias_master = None  # of its own updates; the bias moves without it


def _leave() -> None:
    """In the place of its ``update_bias``."""


def warn_of_untried(gates: Mapping[str, Any]) -> None:
    """Names in one warning what would work, as far as anybody can tell by reading, and that no test has run."""
    kinds = {gate.score_func for gate in gates.values()} - {"softmax", "sigmoid"}
    found = [f"score_func {kind!r}" for kind in sorted(kinds)]
    found += ["group-limited routing"] if any(gate.n_groups > 1 for gate in gates.values()) else []
    if found:
        warnings.warn(
            f"equipoise never ran in Automodel with {', '.join(found)}: look at its first numbers (balance/tokens, "
            "balance/maxvio_global) before you trust it",
            stacklevel=3,
        )
