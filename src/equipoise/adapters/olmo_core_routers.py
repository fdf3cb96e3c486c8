"""OLMo-core's routers: a carrier beside each, what it decides through it; its own balancing off."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError
from ..external.carrier import RouterCarrier
from ..policies.schedule import Schedule
from .plain_state import CHILD, plain_name

__all__ = [
    "BIAS",
    "Documents",
    "balance_router",
    "check_bias",
    "let_go",
    "own_balancing",
    "routers_of",
    "switch_off",
]

BIAS = "score_bias"
TOUCHED = ("forward", "get_expert_logits", "get_top_k", "post_batch")  # of the engine's class
FORCED = ("uniform_expert_assignment", "random_expert_assignment")
VERSION_2 = "olmo_core.nn.moe.v2"
HOOK = "_equipoise_hook"


class Documents:
    """Where documents end in the micro-batch under way: OLMo-core's ``doc_lens``, of packed sequences.

    >>> documents = Documents()
    >>> documents.wanted = True
    >>> documents.read(torch.tensor([[2, 2, 0], [1, 1, 2]]), 4)
    >>> documents.number_T
    tensor([0, 0, 1, 1, 2, 3, 4, 4])
    """

    def __init__(self) -> None:
        self.wanted = False  # by a policy
        self.number_T: Tensor | None = None

    def read(self, lengths_BD: Tensor | None, length: int) -> None:
        """``lengths_BD``: of each sequence's documents, with zeros behind the last. Raises ConfigError without them."""
        if not self.wanted:
            return
        if lengths_BD is None:
            raise ConfigError(
                expected="doc_lens in the batches, for a policy with scope 'document'",
                got="none",
                do="set generate_doc_lengths=True in the dataset's configuration, or balance each sequence",
            )
        begins = torch.zeros(len(lengths_BD), length + 1, dtype=torch.bool, device=lengths_BD.device)
        begins.scatter_(1, lengths_BD.long().cumsum(dim=1).clamp(max=length), True)
        begins[:, 0] = True
        self.number_T = begins[:, :length].flatten().cumsum(0) - 1


def routers_of(model: nn.Module) -> dict[str, Any]:
    """Every router by name. Raises ConfigError for one whose code is not that of OLMo-core's first MoE."""
    theirs = importlib.import_module("olmo_core.nn.moe.router")
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        kind = type(module)
        if kind.__module__.startswith(VERSION_2):
            raise ConfigError(
                expected="OLMo-core's MoE layers olmo_core.nn.moe.MoE or DroplessMoE",
                got=f"{plain_name(name)}: a {kind.__module__}.{kind.__qualname__}, of its second MoE",
                do="balance that one by its own settings: no test of equipoise has run it",
            )
        if not isinstance(module, theirs.MoERouter):
            continue
        if CHILD in module._modules:
            raise ConfigError(
                expected="a model that nothing of equipoise balances yet",
                got=f"{plain_name(name)} with a carrier already",
                do="pass all policies to one BalanceCallback, or remove() the first",
            )
        other = [one for one in TOUCHED if getattr(kind, one, None) is not getattr(theirs.MoELinearRouter, one)]
        if other:
            raise ConfigError(
                expected="OLMo-core's own MoELinearRouter",
                got=f"{plain_name(name)}: a {kind.__module__}.{kind.__qualname__} with its own {other[0]}()",
                do="put a RouterCarrier into that router (docs/own-router.md) and make the Balancer yourself",
            )
        for forced in FORCED:
            if getattr(module, forced):
                raise ConfigError(
                    expected="routers that choose by their scores",
                    got=f"{plain_name(name)}.{forced} = True",
                    do="leave it out: the routers then choose nothing",
                )
        found[plain_name(name)] = module
    if not found:
        raise ConfigError(
            expected="a model with OLMo-core's MoE layers",
            got=f"a {type(model).__name__} without any",
            do="configure one, for example with TransformerConfig.llama_like_moe(...)",
        )
    return found


def balance_router(router: Any, *, takes_bias: bool, documents: Documents) -> RouterCarrier:
    """Puts a carrier beside a router and leads what it decides through it. Without a balancer nothing changes."""
    carrier = RouterCarrier(
        router,
        num_experts=router.num_experts,
        top_k=router.top_k,
        gate=str(router.gating_function),
        bias=BIAS if takes_bias and getattr(router, BIAS) is not None else None,
        without_bias=f"give MoERouterConfig a bias_gamma, whose number is not used: OLMo-core then makes {BIAS}, which "
        "its checkpoints hold",
    )
    raw: list[Tensor] = []  # of the call under way
    logits_of = router.get_expert_logits

    @functools.wraps(logits_of)
    def recorded(x: Tensor) -> Tensor:
        raw[:] = [logits_of(x)]
        return carrier.record(raw[0])

    def attach(router: nn.Module, given: Any, output: tuple[Any, ...]) -> tuple[Any, ...]:  # noqa: ARG001
        weights_BSK, ids_BSK, *rest = output
        layout = TokenLayout(num_sequences=len(ids_BSK), document_T=documents.number_T)
        return (carrier.attach(weights_BSK, raw.pop(), ids_BSK, layout), ids_BSK, *rest)

    router.add_module(CHILD, carrier)
    router.get_expert_logits = recorded
    setattr(router, HOOK, router.register_forward_hook(attach))
    return carrier


def let_go(routers: Mapping[str, Any]) -> None:
    """Undoes `balance_router`."""
    for router in routers.values():
        router.__dict__.pop("get_expert_logits", None)
        router._modules.pop(CHILD, None)
        if (hook := router.__dict__.pop(HOOK, None)) is not None:
            hook.remove()


def own_balancing(routers: Mapping[str, Any], schedule: Schedule) -> str:
    """What OLMo-core itself does at its routers, and what becomes of it beside policies, in words.

    Its z-loss balances nothing and stays. Raises ConfigError for a second one among the policies.
    """
    one = next(iter(routers.values()))
    told = []
    if one.lb_loss_weight is not None:
        told.append(f"load balancing loss {one.lb_loss_weight:g} a layer, over each {one.lb_loss_granularity}")
    if one.bias_gamma is not None:
        told.append(f"{BIAS} moved by {one.bias_gamma:g}")
    if not schedule:
        return f"on, as it was ({', '.join(told)})" if told else "none"
    if one.z_loss_weight is not None and schedule.z_losses:
        raise ConfigError(
            expected="one z-loss at the routers",
            got=f"ZLoss among the policies, and z_loss_weight={one.z_loss_weight:g}",
            do="leave one of them out",
        )
    return f"off (it was {', '.join(told)})" if told else "none"


def switch_off(routers: Mapping[str, Any]) -> None:
    """OLMo-core's own balance losses at the routers and its updates of their bias."""
    for router in routers.values():
        router.lb_loss_weight = None  # read at every call
        router.post_batch = functools.partial(_forget_batch, router)


def _forget_batch(router: Any, dry_run: bool = False) -> None:  # noqa: ARG001
    """In the place of its ``post_batch``, which would move the bias: what it counted is forgotten."""
    if (counted_E := router.score_bias_batch_size_per_expert) is not None:
        counted_E.zero_()


def check_bias(routers: Mapping[str, Any], schedule: Schedule) -> None:
    """Raises ConfigError for a bias that a checkpoint brought, and that no policy moves while the routers learn."""
    for name, router in routers.items():
        bias_E = getattr(router, BIAS)
        if schedule and not schedule.biases and bias_E is not None and bool(bias_E.any()):
            raise ConfigError(
                expected=f"a policy that moves {BIAS}, which the routers choose with",
                got=f"{name}.{BIAS} that is not zero, and OLMo-core's own updates switched off",
                do='add ExpertBias() ("loss-free"), or ExpertBias(rate=0.0) to keep it as it is',
            )
