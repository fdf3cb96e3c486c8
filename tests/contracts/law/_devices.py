"""A second device made of this one's memory: it computes what a CPU computes, and mixes with nothing.

Its tensors say that they lie on ``SECOND`` ("meta", which autograd knows of on every machine) and hold numbers all the
same. An operation of tensors on both devices is the error that two GPUs give; only copies go from one to the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

SECOND = torch.device("meta")
CPU = torch.device("cpu")
aten: Any = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}
EACH = {aten._foreach_copy_.default, aten._foreach_zero_.default}  # one tensor after the other, where they lie apart
READS = {aten._local_scalar_dense.default, aten.equal.default}


class OnSecond(Tensor):
    """A tensor of the second device; ``held`` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnSecond:
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype,
            device=SECOND, requires_grad=False,
        )  # fmt: skip
        wrapper.held = held
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        return self.held.tolist()


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    mine = [one for one in tensors if isinstance(one, OnSecond)]
    others = [one for one in tensors if not isinstance(one, OnSecond) and one.dim()]
    if mine and others and func not in COPIES | EACH:
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got two devices")
    asked = kwargs.get("device")
    goes = bool(mine) if asked is None else torch.device(asked) == SECOND
    if func is aten.copy_.default or func in READS:
        goes = isinstance(args[0], OnSecond)
    inner = {**kwargs, "device": CPU} if asked is not None else kwargs
    out = func(*_held(args), **_held(inner))
    if goes and func not in READS:
        out = tree_map(lambda one: OnSecond(one) if isinstance(one, Tensor) else one, out)
        return return_and_correct_aliasing(func, args, kwargs, out)
    return out


def _held(tree: Any) -> Any:
    return tree_map(lambda one: one.held if isinstance(one, OnSecond) else one, tree)


class _Factories(TorchDispatchMode):
    """What is made on the second device is one of its tensors, with numbers."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        asked = kwargs.get("device")
        if asked is not None and torch.device(asked) == SECOND:
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


@contextmanager
def second_device() -> Iterator[None]:
    with _Factories():
        yield


class Moved(nn.Module):
    """A block on the second device; what goes in and out is moved, as accelerate's hooks do."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = move(block)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = tree_map(lambda x: x.to(SECOND) if isinstance(x, Tensor) else x, (args, kwargs))
        out = self.block(*args, **kwargs)
        return tree_map(lambda x: x.to(CPU) if isinstance(x, Tensor) else x, out)


def move(module: nn.Module) -> nn.Module:
    for part in module.modules():
        for name, one in part._parameters.items():
            if one is not None:
                part._parameters[name] = nn.Parameter(OnSecond(one.detach().clone()), one.requires_grad)
        for name, one in part._buffers.items():
            if one is not None:
                part._buffers[name] = OnSecond(one.detach().clone())
    return module
