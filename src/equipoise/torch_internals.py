"""Private API of torch that the library depends on, all of it: what to look at after an upgrade (tried: 2.11, 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = [
    "copy_all",
    "current_backward",
    "forward_position",
    "is_whole_backward",
    "queue_after_backward",
    "zero_all",
]


def current_backward() -> int:
    """The number of the backward that calls; -1 outside of one.

    >>> current_backward()
    -1
    """
    return torch._C._current_graph_task_id()


def is_whole_backward() -> bool:
    """False in a backward of chosen inputs (``inputs=``, zero-bubble schedules): autograd skips other leaves there."""
    return torch.autograd.Variable._execution_engine.is_checkpoint_valid()


def queue_after_backward(call: Callable[[], None]) -> None:
    """Calls ``call`` when the running backward has ended."""
    torch.autograd.Variable._execution_engine.queue_callback(call)


def forward_position() -> int:
    """The number that autograd gives the next node of this thread: those of one forward are a range."""
    return torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]


def zero_all(tensors: Sequence[Tensor]) -> None:
    """Zeroes many tensors in one operation a device."""
    torch._foreach_zero_(tensors)  # type: ignore[reportPrivateImportUsage]


def copy_all(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copies many tensors in one operation a device."""
    torch._foreach_copy_(tensors, values)  # type: ignore[reportPrivateImportUsage]
