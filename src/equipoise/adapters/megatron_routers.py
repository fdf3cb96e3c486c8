"""Megatron-core's routers: a carrier beside each, and its `routing` through it; its own balancing off."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError
from ..external.carrier import RouterCarrier
from ..policies.schedule import Schedule
from .megatron_parallel import is_a_stage
from .plain_state import CHILD

__all__ = [
    "BIAS",
    "balance_router",
    "hidden_carriers",
    "in_our_unit",
    "let_go",
    "own_balancing",
    "routers_of",
    "switch_off",
]

BIAS = "expert_bias"
AUX_LOSSES = {"aux_loss": "micro_batch", "seq_aux_loss": "sequence", "global_aux_loss": "global_batch"}
TOUCHED = ("routing", "gating", "forward")  # of the engine's class: where the logits pass


def routers_of(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """Every router by name. Raises ConfigError for one whose code is not Megatron-core's own."""
    theirs = importlib.import_module("megatron.core.transformer.moe.router")
    found: dict[str, Any] = {}
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if not isinstance(module, theirs.Router):
                continue
            other = [one for one in TOUCHED if getattr(type(module), one, None) is not getattr(theirs.TopKRouter, one)]
            if CHILD in module._modules:
                raise ConfigError(
                    expected="a model that nothing of equipoise balances yet",
                    got=f"{name} with a carrier already",
                    do="pass all policies to one MegatronBalancer, or remove() the first",
                )
            if other:
                raise ConfigError(
                    expected="Megatron-core's own TopKRouter",
                    got=f"{name}: a {type(module).__module__}.{type(module).__qualname__} with its own {other[0]}()",
                    do="put a RouterCarrier into that router (docs/own-router.md) and make the Balancer yourself",
                )
            found[name] = module
    if not found and not is_a_stage():
        raise ConfigError(
            expected="a model with Megatron-core's MoE layers",
            got=", ".join(type(chunk).__name__ for chunk in chunks) or "no model chunk",
            do="pass what get_model or your own construction returned, with num_moe_experts in its configuration",
        )
    return found


def balance_router(router: Any, *, takes_bias: bool) -> RouterCarrier:
    """Puts a carrier beside a router and leads what it decides through it. Without a balancer nothing changes."""
    config = router.config
    carrier = RouterCarrier(
        router,
        num_experts=config.num_moe_experts,
        top_k=config.moe_router_topk,
        gate=router.score_function,
        bias=BIAS if takes_bias and router.expert_bias is not None else None,
        without_bias="build the model with moe_router_enable_expert_bias=True and moe_router_score_function='sigmoid': "
        f"Megatron then makes {BIAS}, which its checkpoints hold",
        sequence_first=True,
    )
    router.add_module(CHILD, carrier)
    routing = router.routing

    @functools.wraps(routing)
    def balanced(logits_SBE: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        probs, chosen = routing(carrier.record(logits_SBE), padding_mask=padding_mask)
        mask_T = None if padding_mask is None else ~padding_mask.T.flatten()  # theirs is True where there is no token
        layout = TokenLayout(num_sequences=logits_SBE.shape[1], token_mask_T=mask_T)
        chosen_SBE = chosen.view(logits_SBE.shape)
        return carrier.attach(probs, logits_SBE, chosen_SBE, layout), chosen

    router.routing = balanced
    return carrier


def let_go(routers: dict[str, Any]) -> None:
    """Undoes `balance_router`."""
    for router in routers.values():
        router.__dict__.pop("routing", None)
        router._modules.pop(CHILD, None)


def own_balancing(routers: dict[str, Any], schedule: Schedule) -> str:
    """What Megatron itself balances by, and what becomes of it beside policies, in words.

    Raises ConfigError for one that cannot be, or whose bias would stand still while the routers learn.
    """
    any_router = next(iter(routers.values()), None)
    if any_router is None:
        return "none on this pipeline stage, which has no MoE layer"
    config, kinds = any_router.config, any_router.routing_type
    names = [kinds] if isinstance(kinds, str) else list(kinds)
    losses = [name for name in AUX_LOSSES if any_router.get_aux_loss_coeff(name) > 0]
    if "sinkhorn" in names:
        raise ConfigError(
            expected="moe_router_load_balancing_type 'none', or one of its losses",
            got="'sinkhorn', which chooses experts by other numbers than the logits",
            do="train with 'none': equipoise balances",
        )
    told = [f"{name} {any_router.get_aux_loss_coeff(name):g}" for name in losses]
    if config.moe_router_enable_expert_bias:
        told.append(f"{BIAS} moved by {config.moe_router_bias_update_rate:g}")
    if not schedule:
        return f"on, as it was ({', '.join(told)})" if told else "none"
    if config.moe_z_loss_coeff and schedule.z_losses:
        raise ConfigError(
            expected="one z-loss",
            got=f"ZLoss among the policies, and moe_z_loss_coeff={config.moe_z_loss_coeff:g}",
            do="leave one of them out",
        )
    for name, router in routers.items():
        if router.expert_bias is not None and not schedule.biases and bool(router.expert_bias.any()):
            raise ConfigError(
                expected=f"a policy that moves {BIAS}, which the routers choose with",
                got=f"{name}.{BIAS} that is not zero, and Megatron's own updates switched off",
                do='add ExpertBias() ("loss-free"), or ExpertBias(rate=0.0) to keep it as it is',
            )
    return f"off (it was {', '.join(told)})" if told else "none"


def in_our_unit(routers: dict[str, Any], data_ranks: int) -> str:
    """What Megatron's coefficients amount to as ours, of the same f: measured by our tests. "" where it has none."""
    router = next(iter(routers.values()), None)
    found, own = [], router.get_aux_loss_coeff if router is not None else lambda _: 0.0
    for name, scope in AUX_LOSSES.items():
        if (coef := own(name)) > 0:
            assert router is not None
            parts = router.config.tensor_model_parallel_size * router.config.context_parallel_size
            shrinks = {"data ranks": data_ranks if scope == "global_batch" else 1}
            shrinks["ranks that share a sequence"] = parts if router.config.calculate_per_token_loss else 1
            why = "".join(f", divided by {number} {what}" for what, number in shrinks.items() if number > 1)
            amount = coef / math.prod(shrinks.values())
            found.append(f"{name} {coef:g} is AuxLoss({scope!r}, coef={amount:g}){why}")
    return "; ".join(found)


def switch_off(routers: dict[str, Any]) -> None:
    """Megatron's own losses and updates of its bias."""
    for router in routers.values():
        router.routing_type = "none"  # read at every call; the configuration stays as it was written
        router.enable_expert_bias = False  # it would go on counting
        router.config.moe_router_enable_expert_bias = False  # what finalize_model_grads asks before it moves the bias


@contextmanager
def hidden_carriers(routers: dict[str, Any]) -> Iterator[None]:
    """While Megatron moves its own biases: it takes every module with the attribute ``expert_bias`` for a router."""
    carriers = [router._modules.pop(CHILD, None) for router in routers.values()]
    try:
        yield
    finally:
        for router, carrier in zip(routers.values(), carriers, strict=True):
            if carrier is not None:
                router._modules[CHILD] = carrier
