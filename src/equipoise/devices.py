"""Whose values can be looked at: a CPU's at any time, a GPU's only by making everybody wait."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["HOST_READABLE", "host_readable", "to_device"]

HOST_READABLE = {"cpu"}  # types of devices whose values can be read without waiting for them; tests take the CPU out


def host_readable(device: torch.device) -> bool:
    """Whether a value on this device can be looked at without waiting.

    >>> host_readable(torch.device("cpu")), host_readable(torch.device("cuda"))
    (True, False)
    """
    return device.type in HOST_READABLE


def to_device(numbers: Sequence[float], device: torch.device) -> Tensor:
    """(n,) fp64 on the device, without waiting for it: from memory that a GPU reads by itself.

    >>> to_device([1, 2], torch.device("cpu"))
    tensor([1., 2.], dtype=torch.float64)
    """
    pinned = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.float64, pin_memory=pinned).to(device, non_blocking=pinned)
