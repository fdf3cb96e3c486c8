"""The routers of a model that is inspected, also of one that cannot be balanced; see `equipoise.external.observe`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import ConfigError
from ..external import observe
from ..external.observe import ObservedRouter
from ..external.output_formats import FORMATS, format_of

__all__ = ["find_routers"]

SIGNS = ("moe", "router", "expert", "gating")  # in the names of classes that route


def find_routers(model: nn.Module, forward: Callable[[], Any]) -> list[ObservedRouter]:
    """The routers that a text reaches, in the order of the model's modules; ``forward`` runs the model on some tokens.

    No-op experts count as experts: an inspection shows what is chosen, and they are chosen too.

    Raises ConfigError for a dense model, and for one whose routers' choices cannot be read.
    """
    found = observe.find_routers(model, forward)
    if not found:
        raise _nothing_found(model)
    return [replace(one, num_experts=one.num_experts + one.idle, idle=0) if one.idle else one for one in found]


def _nothing_found(model: nn.Module) -> ConfigError:
    """The error for a dense model, or one with routers that cannot be read."""
    modules = {type(module): module for module in model.modules()}
    refused = [f"{kind.__name__}: {why}" for kind, m in modules.items() if (why := format_of(m).unsupported)]
    suspects = [kind.__name__ for kind in modules if any(sign in kind.__name__.lower() for sign in SIGNS)]
    if not refused and not suspects:
        return ConfigError(
            expected="a mixture-of-experts model",
            got=f"{type(model).__name__}, a dense model: no module of it routes tokens to experts",
            do="inspect a model with MoE layers; docs/families.md has the families that were tried",
        )
    readable = sorted(name for name, form in FORMATS.items() if form.choices is not None)
    router = refused[0].partition(":")[0] if refused else suspects[0]
    return ConfigError(
        expected="routers that return logits (T, E), weights (T, K) and expert ids (T, K), as the families in "
        f"docs/families.md do, or one of {', '.join(readable)}",
        got=refused[0] if refused else f"{', '.join(suspects[:4])}, of which none returns these",
        do=f'in Python, before equipoise.inspection.inspect: equipoise.register_router("{router}", read=lambda module, '
        "args, kwargs, output: (logits, weights, ids)), with the class of its router (docs/own-router.md)",
    )
