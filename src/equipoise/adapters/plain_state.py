"""A balancer's state under names that wrappers do not change: recompute, compilation and DDP may come and go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..balancer.balancer import Balancer

__all__ = ["CHILD", "load_plain_state", "plain_name", "plain_state"]

CHILD = "equipoise"  # of an engine's router: the carrier
WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.")


def plain_name(name: str) -> str:
    """Without what recomputation, compilation and DDP put around a module, and without our own child.

    >>> plain_name("module.layers.0._checkpoint_wrapped_module.moe.router.equipoise")
    'layers.0.moe.router'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name.removeprefix("module.").removesuffix(f".{CHILD}")


def plain_state(balancer: Balancer) -> dict[str, Any]:
    """``Balancer.state_dict``, its layers under plain names."""
    state = balancer.state_dict()
    return state | {"layers": {plain_name(name): one for name, one in state["layers"].items()}}


def load_plain_state(balancer: Balancer, state: Mapping[str, Any], *, strict: bool) -> list[str]:
    """``Balancer.load_state_dict`` of what `plain_state` gave, whatever wraps the layers now."""
    names = {plain_name(name): name for name in balancer.routers}
    layers = {names.get(name, name): one for name, one in state["layers"].items()}
    return balancer.load_state_dict({**state, "layers": layers}, strict=strict)
