"""Finds the routers of a model, also of those that cannot be balanced, and reads what they choose as a text passes.

Every module that returns logits (T, E), weights (T, K) and expert ids (T, K) is a router (`external.output_formats`);
``LOOK`` holds the classes whose choice is not in their output. Nothing is changed: no loss, no output, no bias.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..external.output_formats import SPECIAL, Read, Special, read
from ..functional.routing import GATES, gate_scores
from ..layers.router import Router

__all__ = ["LOOK", "Found", "Seen", "find_routers", "reading"]

SIGNS = ("moe", "router", "expert", "gating")  # in the names of classes that route
CLOSE = 2e-2  # relative; weights may be bf16


class Seen(NamedTuple):
    """What a router decided about T tokens."""

    logits_TE: Tensor
    ids_TK: Tensor


@dataclass(frozen=True)
class Found:
    """One router. ``gate`` is the one that its weights follow from, "softmax" where none fits (``sure`` False)."""

    name: str
    module: nn.Module
    num_experts: int
    top_k: int
    gate: str
    look: Callable[[Any], Seen]  # the module's output, taken apart
    sure: bool = True


Look = Callable[[nn.Module, nn.Module, Any], Seen]  # router, the module that holds it, the router's output


def _best(logits: Tensor, top_k: int) -> Seen:
    logits_TE = logits.reshape(-1, logits.shape[-1])
    return Seen(logits_TE, logits_TE.topk(top_k, dim=-1).indices)


def _zaya(router: Any, _block: nn.Module, output: Any) -> Seen:
    """The expert that skips the layer is the last one; the output calls it expert 0."""
    logits_TE = output[0].reshape(-1, output[0].shape[-1])
    biased_TE = logits_TE.softmax(dim=-1).float() + router.balancing_biases
    return Seen(logits_TE, biased_TE.topk(int(router.top_k), dim=-1).indices)


LOOK: dict[str, Look] = {
    "DbrxRouter": lambda _router, block, output: _best(output, int(block.top_k)),  # type: ignore[arg-type]
    "JetMoeTopKGating": lambda router, _block, output: _best(output[-1], int(router.top_k)),  # type: ignore[arg-type]
    "ZayaRouter": _zaya,
    # what their tokens ask for, before an expert's capacity drops some
    "SwitchTransformersTop1Router": lambda _router, _block, output: _best(output[2], 1),
    "NllbMoeTop2Router": lambda _router, _block, output: _best(output[2], 2),
}


@torch.no_grad()
def find_routers(model: nn.Module, forward: Callable[[], Any]) -> list[Found]:
    """The routers that a text passes, in the order of the model's modules; ``forward`` runs the model on some tokens.

    Raises ConfigError for a dense model, and for one whose routers say nothing that can be read.
    """
    modules = dict(model.named_modules())
    routings = [name for name, module in modules.items() if isinstance(module, Router)]
    if routings:  # ours
        return [_ours(name, modules[name]) for name in routings]
    found: dict[str, Found] = {}

    def note(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            if name not in found and (one := _recognize(name, modules, output)) is not None:
                found[name] = one

        return hook

    hooks = [module.register_forward_hook(note(name)) for name, module in modules.items() if name]
    try:
        forward()
    finally:
        for hook in hooks:
            hook.remove()
    # a block that hands its router's output on looks like a router too
    inner = [found[name] for name in modules if name in found and not any(o.startswith(f"{name}.") for o in found)]
    if not inner:
        raise _nothing_found(model)
    return inner


@contextmanager
def reading(found: Sequence[Found]) -> Iterator[dict[str, Seen]]:
    """While it is open, holds what each router did in the last forward, by name."""
    seen: dict[str, Seen] = {}

    def note(one: Found) -> Any:
        def hook(_module: nn.Module, _args: tuple, output: Any) -> None:
            seen[one.name] = one.look(output)

        return hook

    hooks = [one.module.register_forward_hook(note(one)) for one in found]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _ours(name: str, module: Any) -> Found:
    return Found(name, module, module.num_experts, module.top_k, module.gate,
                 lambda routing: Seen(routing.logits_TE, routing.expert_ids_TK))  # fmt: skip


def _recognize(name: str, modules: dict[str, nn.Module], output: Any) -> Found | None:
    module = modules[name]
    if (look := LOOK.get(type(module).__name__)) is not None:
        taken = partial(look, module, modules[name.rpartition(".")[0]])
        seen = taken(output)
        return Found(name, module, seen.logits_TE.shape[-1], seen.ids_TK.shape[-1], "softmax", taken)
    parts = read(module, output)
    if parts is None:
        return None
    probabilities = _are_probabilities(parts.logits_TE)
    taken = partial(_taken, module, probabilities)
    experts, top_k = parts.logits_TE.shape[-1], parts.ids_TK.shape[-1]
    if gate := SPECIAL.get(type(module).__name__, Special()).gate:
        return Found(name, module, experts, top_k, gate, taken)
    gate, distance = _gate(parts._replace(logits_TE=taken(output).logits_TE))
    return Found(name, module, experts, top_k, gate if distance <= CLOSE else "softmax", taken, distance <= CLOSE)


def _taken(module: nn.Module, probabilities: bool, output: Any) -> Seen:
    parts = read(module, output)
    assert parts is not None, "its output had these parts in the first forward"
    logits_TE = parts.logits_TE
    if probabilities:
        logits_TE = logits_TE.clamp(min=torch.finfo(logits_TE.dtype).tiny).log()
    return Seen(logits_TE, parts.ids_TK)


def _are_probabilities(x_TE: Tensor) -> bool:
    return bool((x_TE >= 0).all() and ((x_TE.float().sum(dim=-1) - 1).abs() < CLOSE).all())


def _gate(parts: Read) -> tuple[str, float]:
    """The gate that fits best, and how well: weights are its scores times a constant, or shares of their sum."""
    weights_TK = parts.weights_TK.float()
    total_T1 = weights_TK.sum(dim=-1, keepdim=True)
    fits = []
    for gate in GATES:
        scores_TK = gate_scores(parts.logits_TE.float(), gate).gather(-1, parts.ids_TK.long()).clamp(min=1e-20)
        shares_TK = total_T1.mean() * scores_TK / scores_TK.sum(dim=-1, keepdim=True)
        times_TK = (weights_TK / scores_TK).median() * scores_TK
        fits += [
            (float(((weights_TK - x_TK).abs() / (x_TK.abs() + 1e-4)).max()), gate) for x_TK in (shares_TK, times_TK)
        ]
    distance, gate = min(fits, key=lambda fit: fit[0])  # the first of equals, as with K = 1
    return gate, distance


def _nothing_found(model: nn.Module) -> ConfigError:
    """A dense model, or one whose way to route is not known."""
    kinds = list(dict.fromkeys(type(module).__name__ for module in model.modules()))
    refused = [f"{kind}: {reason}" for kind in kinds if (reason := SPECIAL.get(kind, Special()).refuse)]
    suspects = [kind for kind in kinds if any(sign in kind.lower() for sign in SIGNS)]
    if not refused and not suspects:
        return ConfigError(
            expected="a mixture-of-experts model",
            got=f"{type(model).__name__}, a dense model: no module of it routes tokens to experts",
            do="inspect a model with MoE layers; docs/families.md has the families that were tried",
        )
    return ConfigError(
        expected="routers that return logits (T, E), weights (T, K) and expert ids (T, K), as the families in "
        f"docs/families.md do, or one of {', '.join(sorted(LOOK))}",
        got=refused[0] if refused else f"{', '.join(suspects[:4])}, of which none returns these",
        do="describe its class with a line in equipoise.inspection.routers.LOOK: from its output to logits and ids",
    )
