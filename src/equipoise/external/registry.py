"""``register_router``: how to read router classes that do not return logits, weights and expert ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from ..errors import ConfigError, unknown_name
from ..functional.routing import GATES

__all__ = ["REGISTERED", "Registered", "register_router", "registered_for"]


class Registered(NamedTuple):
    """What a user stated about one class."""

    read: Callable[..., Any] | None
    write: Callable[..., Any] | None
    gate: str


REGISTERED: dict[type[nn.Module] | str, Registered] = {}


def register_router(
    router: type[nn.Module] | str,
    read: Callable[..., Any] | None = None,
    write: Callable[..., Any] | None = None,
    *,
    gate: str | None = None,
) -> None:
    """Registers how to read a router class whose output does not contain logits, weights and expert ids.

    A module that returns logits (T, E), weights (T, K) and ids (T, K) in a tuple, list, dict or dataclass, in any order
    and with leading dimensions (B, S) in place of T, is found without. Registering a class again replaces the first
    registration. Balancing, evaluation and inspection all read the class this way.

    Args:
        router: the class, or its name if it cannot be imported (remote code); subclasses are included.
        read: ``read(module, args, kwargs, output) -> (logits, weights, ids)``, called after each forward of such a
            module with the arguments of a forward hook. It returns float logits (..., E), float weights (..., K) and
            integer ids (..., K) with the same leading dimensions; an id of -1 is a dropped choice. None: this call
            routed nothing. Logits that the output lacks may be computed from ``args``: they need a gradient to the
            gate, and the weights have to be a softmax, a sigmoid or a sqrt_softplus of them (divided by their sum or
            not, times a constant).
        write: ``write(output, weights, ids) -> output``, the same output with new weights and ids of the shapes that
            ``read`` returned. Default: the tensors that ``read`` returned are replaced where the output contains them,
            also in nested tuples, lists, dicts and dataclasses.
        gate: only for weights that are more than scores (a learned factor, noise): the gate of the scores, which is
            what a loss acts on. Such a router gets no bias of ours.

    Raises ConfigError for anything but a class of modules or its name, for an unknown gate, and where neither ``read``
    nor ``gate`` is given.

    >>> import torch
    >>> class MoEGate(nn.Module):  # like DeepSeek's, whose output has no logits
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(4, 8))
    ...     def forward(self, x):
    ...         weights, ids = (x @ self.weight.T).softmax(dim=-1).topk(2)
    ...         return ids, weights, None
    >>> def read(module, args, kwargs, output):
    ...     return args[0] @ module.weight.T, output[1], output[0]
    >>> register_router(MoEGate, read)
    """
    if not (isinstance(router, str) or (isinstance(router, type) and issubclass(router, nn.Module))):
        raise ConfigError(
            expected="a class of torch modules, or its name",
            got=repr(router),
            do="pass type(router) for a module that you have",
        )
    if gate is not None and gate not in GATES:
        raise unknown_name("gate", gate, GATES)
    if read is None and (gate is None or write is not None):
        raise ConfigError(
            expected="read=, how to find logits, weights and ids",
            got="write= alone" if write is not None else "neither read= nor gate=",
            do="pass read=lambda module, args, kwargs, output: (logits, weights, ids)",
        )
    REGISTERED[router] = Registered(read, write, gate or "")


def registered_for(module: nn.Module) -> Registered | None:
    """The registration of the module's class or of any base class (FSDP2 subclasses dynamically)."""
    if not REGISTERED:
        return None
    keys = (key for kind in type(module).__mro__ for key in (kind, kind.__name__))
    return next((REGISTERED[key] for key in keys if key in REGISTERED), None)
