"""Private API of torch that the library depends on, all of it: what to look at after an upgrade (tried: 2.11, 2.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "WRAPPED",
    "copy_all",
    "current_backward",
    "forward_position",
    "fsdp_parameter_lists",
    "has_step_hooks",
    "is_whole_backward",
    "multiplies_bf16",
    "queue_after_backward",
    "softmax_gradient",
    "zero_all",
]

# Where the compiler, FSDP1 and checkpoint wrappers keep the module that they wrap.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

softmax_gradient = torch.ops.aten._softmax_backward_data.default  # (gradient, softmax, dim, dtype)


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


def has_step_hooks(optimizer: object) -> bool:
    """Whether an optimizer calls hooks around its step, as all that derive from torch's do."""
    return hasattr(optimizer, "_optimizer_step_post_hooks")


def fsdp_parameter_lists(model: nn.Module) -> Iterator[list[Any]]:
    """The lists in which FSDP2 keeps the parameters that it shards; empty for a model without FSDP2."""
    for module in model.modules():
        if hasattr(module, "_get_fsdp_state"):
            state: Any = module._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
            yield from (group.fsdp_params for group in groups if group is not None)


def multiplies_bf16() -> bool:
    """Whether oneDNN says that this processor has instructions for products in bf16."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())
