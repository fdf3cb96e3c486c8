"""Finds a model's routers, ours or another library's, and captures what they choose; changes nothing in the model.

    routers = find_routers(model, lambda: model(**batch))
    with capture(routers) as choices:
        model(**batch)
    choices["layers.0.gate"].ids_TK

Routers that cannot be balanced are found too, as long as their choices can be read (``FORMATS`` in `output_formats`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .example_run import ExampleRun, RouterCall
from .gate_fitting import log_probabilities
from .output_formats import format_of, parse_output
from .recognition import first_calls, router_call
from .router import attached_routers
from .router_spec import RouterSpec, fit_spec_to_observe
from .token_ids import RouterMask

__all__ = ["Choices", "ObservedRouter", "capture", "find_routers", "is_own_router", "observed"]


class Choices(NamedTuple):
    """What a router decided about T tokens.

    ``logits_TE`` has columns for no-op experts too; an id of -1 is a choice that the router dropped, an id of E behind
    all of them one that is none (`equipoise.Router` with ``top_p``, or with a mask by token id).
    """

    logits_TE: Tensor
    ids_TK: Tensor


@dataclass(frozen=True)
class ObservedRouter:
    """One router and how to read what it chose."""

    name: str
    module: nn.Module
    num_experts: int  # without no-op experts
    top_k: int
    gate: str
    read: Callable[[tuple, dict[str, Any], Any], Choices]  # from the arguments and the output of a call
    idle: int = 0  # no-op experts, whose ids follow those of the experts
    gate_fits: bool = True  # False: the router's weights follow from no known gate, and softmax is assumed
    drops: bool = False  # choices may be none


def is_own_router(module: nn.Module) -> bool:
    """Whether this is a router of `equipoise.layers`, which says by itself what it chose."""
    return any(kind.__module__ == "equipoise.layers.router" for kind in type(module).__mro__)


@torch.no_grad()
def find_routers(model: nn.Module, run: Callable[[], Any]) -> list[ObservedRouter]:
    """The routers of a model in the order of its modules; an empty list for a dense model.

    Args:
        model: the model; it may have a ``Balancer``.
        run: calls the model on some tokens. Needed for the routers of other libraries: those that the tokens do not
            reach are not found.

    Raises ConfigError where the ``read`` that a router class was registered with fails.

    >>> class Gate(nn.Linear):
    ...     def forward(self, x):
    ...         z = super().forward(x)
    ...         return z, *z.sigmoid().topk(2)
    >>> model = nn.Sequential(Gate(8, 4))
    >>> (router,) = find_routers(model, lambda: model(torch.randn(16, 8)))
    >>> router.name, router.num_experts, router.top_k, router.gate
    ('0', 4, 2, 'sigmoid')
    """
    modules = dict(model.named_modules())
    own = [name for name, module in modules.items() if is_own_router(module)]
    if own:
        return [_own(name, modules[name]) for name in own]
    if attached := attached_routers(model):
        return [observed(name, one.module, one.spec, one.mask) for name, one in attached]

    def recognize(name: str, module: nn.Module, *call: Any) -> ObservedRouter | RouterCall | None:
        if (choices := format_of(module).choices) is not None:
            return _choosing(name, module, partial(choices, module, modules[name.rpartition(".")[0]]), call[-1])
        return router_call(name, module, *call)

    found, _ = first_calls(ExampleRun(model, {}, run), modules, recognize)
    return [
        one
        if isinstance(one, ObservedRouter)
        else observed(name, modules[name], fit_spec_to_observe(modules[name], name, one))
        for name, one in found.items()
    ]


def observed(name: str, module: nn.Module, spec: RouterSpec, mask: RouterMask | None = None) -> ObservedRouter:
    """Another library's router whose specification is known."""
    return ObservedRouter(
        name,
        module,
        spec.num_experts,
        spec.top_k,
        spec.gate,
        partial(_read, module, spec, mask),
        spec.idle,
        spec.gate_fits,
        mask is not None and mask.drops,
    )


@contextmanager
def capture(routers: Sequence[ObservedRouter]) -> Iterator[dict[str, Choices]]:
    """Inside the context, a dict with what each router chose in its last forward, by name.

    Its hooks run after those of a balancer, which may have chosen again.
    """
    seen: dict[str, Choices] = {}

    def hook_of(router: ObservedRouter) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            seen[router.name] = router.read(args, kwargs, output)

        return hook

    hooks = [one.module.register_forward_hook(hook_of(one), with_kwargs=True) for one in routers]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _own(name: str, module: Any) -> ObservedRouter:
    return ObservedRouter(
        name,
        module,
        module.num_experts,
        module.top_k,
        module.gate,
        lambda _args, _kwargs, routing: Choices(routing.logits_TE, routing.expert_ids_TK),
        drops=module.drops,
    )


def _choosing(name: str, module: nn.Module, choices: Callable[[Any], Any], output: Any) -> ObservedRouter:
    """A router whose output does not hold the ids: its format reads them."""
    logits_TE, ids_TK = choices(output)
    return ObservedRouter(
        name,
        module,
        logits_TE.shape[-1],
        ids_TK.shape[-1],
        "softmax",
        lambda _args, _kwargs, output: Choices(*choices(output)),
    )


def _read(
    module: nn.Module, spec: RouterSpec, mask: RouterMask | None, args: tuple, kwargs: dict[str, Any], output: Any
) -> Choices:
    parsed = parse_output(module, args, kwargs, output, swapped=spec.swapped)
    assert parsed is not None, "its output was parsed in the example run"
    logits_TE, ids_TK = parsed.parts.logits_TE, parsed.parts.ids_TK
    logits_TE = log_probabilities(logits_TE) if spec.probabilities else logits_TE
    if mask is not None:
        logits_TE = mask.hide(logits_TE)
    if mask is not None and mask.drops:  # its first expert again is no choice
        again_TK = ids_TK[:, 1:] == ids_TK[:, :1]
        ids_TK = torch.cat([ids_TK[:, :1], ids_TK[:, 1:].masked_fill(again_TK, spec.num_experts)], dim=1)
    return Choices(logits_TE, ids_TK)
