"""torchtitan's routers: a carrier beside each, two forward hooks that hand its logits and weights through it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..autograd.token_layout import TokenLayout
from ..errors import ConfigError, InputError
from ..external.carrier import RouterCarrier
from .plain_state import CHILD, plain_name

__all__ = ["PackedDocuments", "RouterHooks", "hook_routers", "moe_layers"]

BIAS = "expert_bias_E"  # of the MoE layer; its checkpoints have it


class RouterHooks:
    """What is hung on one MoE layer; without a balancer it changes nothing.

    Args:
        moe: a layer of torchtitan's class ``MoE``.
        takes_bias: whether its bias is to be moved by a policy.
        documents: tells the documents of the micro-batch under way, (T,), or None.
    """

    def __init__(self, moe: Any, *, takes_bias: bool, documents: PackedDocuments) -> None:
        router = moe.router
        self.carrier = RouterCarrier(
            router,
            num_experts=router.num_experts,
            top_k=router.top_k,
            gate=router.score_func,
            bias=BIAS if takes_bias and getattr(moe, BIAS) is not None else None,
            bias_of=moe,
            without_bias="give its MoE.Config a load_balance_coeff, whose number is not used: torchtitan then makes "
            f"{BIAS}, which its checkpoints hold",
        )
        self._documents = documents
        self._raw: Tensor | None = None
        router.add_module(CHILD, self.carrier)
        router.gate.register_forward_hook(self._record)
        router.register_forward_hook(self._attach)

    def _record(self, gate: nn.Module, given: Any, raw: Tensor) -> Tensor:  # noqa: ARG002
        if hasattr(raw, "to_local"):
            raise InputError(
                expected="router logits that every rank holds whole",
                got=f"a DTensor of {getattr(raw, 'placements', '')}",
                do="train without tensor parallelism: equipoise was never tried with it in torchtitan",
            )
        self._raw = raw
        return self.carrier.record(raw)

    def _attach(self, router: nn.Module, given: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002
        weights, ids, *rest = output
        raw, self._raw = self._raw, None
        assert raw is not None
        layout = TokenLayout(num_sequences=len(ids), document_T=self._documents.number_T)
        return (self.carrier.attach(weights, raw, ids, layout), ids, *rest)


class PackedDocuments:
    """Where documents end in the micro-batch under way: torchtitan's positions begin again at 0 with each.

    >>> import torch
    >>> documents = PackedDocuments()
    >>> documents.read(None, (), {"positions": torch.tensor([[0, 1, 0], [0, 1, 2]])})
    >>> documents.number_T
    tensor([0, 0, 1, 2, 2, 2])
    """

    def __init__(self) -> None:
        self.number_T: Tensor | None = None

    def read(self, model: nn.Module | None, given: tuple, named: dict[str, Any]) -> None:  # noqa: ARG002
        """A forward hook of the model, before it."""
        positions = named.get("positions")
        if positions is None:
            self.number_T = None
            return
        begins = positions == 0
        begins[:, 0] = True  # the end of one that began in the row before
        self.number_T = begins.flatten().cumsum(0) - 1


def hook_routers(
    model_parts: Sequence[nn.Module], *, takes_bias: bool, documents: bool
) -> list[tuple[str, RouterHooks]]:
    """Hangs a carrier beside every router, after all were looked at. ``documents``: a policy asks for them.

    Raises ConfigError, with nothing changed, for a layer or a router that is not known.
    """
    layers = list(moe_layers(model_parts))
    packed = PackedDocuments()
    for part in model_parts if documents else ():
        part.register_forward_pre_hook(packed.read, with_kwargs=True)
    return [(name, RouterHooks(moe, takes_bias=takes_bias, documents=packed)) for name, moe in layers]


def moe_layers(model_parts: Sequence[nn.Module]) -> Iterator[tuple[str, Any]]:
    """(name, layer) of every MoE layer, as torchtitan names them.

    Raises ConfigError for a layer whose forward is not torchtitan's, and for a router that is of another kind or in
    another place.
    """
    theirs = importlib.import_module("torchtitan.models.common.moe")
    known: set[int] = set()
    found = [(plain_name(n), m) for part in model_parts for n, m in part.named_modules() if isinstance(m, theirs.MoE)]
    for name, moe in found:
        router = moe.router
        if type(moe).forward is not theirs.MoE.forward:
            raise _unknown(name, moe, "MoE")
        if getattr(type(router), "forward", None) is not theirs.TokenChoiceTopKRouter.forward:
            raise _unknown(f"{name}.router", router, "TokenChoiceTopKRouter")
        known.add(id(router))
    for part in model_parts:
        for name, module in part.named_modules():
            if type(module).__name__.endswith("Router") and id(module) not in known:
                raise _unknown(plain_name(name), module, "TokenChoiceTopKRouter inside a layer of its class MoE")
    yield from found


def _unknown(name: str, module: Any, known: str) -> ConfigError:
    kind = next(cls for cls in type(module).__mro__ if not cls.__name__.startswith("FSDP"))
    return ConfigError(
        expected=f"torchtitan's own {known}",
        got=f"{name}: a {kind.__module__}.{kind.__qualname__} with a forward of its own",
        do="put a RouterCarrier into that router (docs/own-router.md) and make the Balancer in a Trainer of your own",
    )
