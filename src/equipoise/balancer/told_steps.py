"""What ends a step where it is no optimizer of torch: an engine of which an adapter tells."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch.utils.hooks import RemovableHandle

from ..errors import ConfigError
from ..torch_internals import has_step_hooks

__all__ = ["ToldSteps", "optimizer_with_hooks"]


class ToldSteps:
    """Steps of an engine of which an adapter tells; given to the balancer as its optimizer.

    It says of each step and of each skip, so nothing is concluded from what becomes of weights and gradients between
    them: they may be sharded, moved into buckets, or elsewhere.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._hooks: tuple[OrderedDict, ...] = (OrderedDict(), OrderedDict(), OrderedDict())

    def register_step_pre_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        return self._register(0, hook)

    def register_step_post_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        return self._register(1, hook)

    def register_step_skip_hook(self, hook: Callable[..., None]) -> RemovableHandle:
        return self._register(2, hook)

    def _register(self, which: int, hook: Callable[..., None]) -> RemovableHandle:
        handle = RemovableHandle(self._hooks[which])
        self._hooks[which][handle.id] = hook
        return handle

    def begins(self) -> None:
        """All gradients of the step are there."""
        self._call(0)

    def ended(self) -> None:
        """The weights have moved."""
        self._call(1)

    def skipped(self) -> None:
        """They have not, and will not: infinite gradients."""
        self._call(2)

    def _call(self, which: int) -> None:
        for hook in list(self._hooks[which].values()):
            hook(self, (), {})


def optimizer_with_hooks(optimizer: Any) -> Any:
    """What tells of steps: the optimizer, the one that it wraps as ``.optimizer`` (accelerate's), or an adapter.

    Raises ConfigError for anything else.
    """
    inner = optimizer
    while inner is not None and not isinstance(inner, ToldSteps) and not has_step_hooks(inner):
        inner = getattr(inner, "optimizer", None)
    if inner is None and optimizer is not None:
        raise ConfigError(
            expected="a torch.optim.Optimizer, whose steps can be seen",
            got=f"a {type(optimizer).__name__}, which has no step hooks",
            do="pass the torch optimizer inside it, or leave it out and call balancer.step() right after its step",
        )
    return inner
