"""What torchtitan 0.3.0 needs to train on a machine without an accelerator; imported before anything else of it.

It takes "cuda" where torch has no accelerator, and no configuration says otherwise; torch 2.13 has no
``torch.distributed.set_timeout``; gloo does not know PREMUL_SUM, in which FSDP2 sums with a factor of its own.
"""

from __future__ import annotations

import types
from typing import Any

import torch
import torchtitan.tools.utils as engine_utils
from torch import nn
from torch.distributed.fsdp import FSDPModule


class Cpu(types.ModuleType):
    """``torch.cpu`` with what torchtitan asks of ``torch.cuda``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cpu, name)

    def device_count(self) -> int:
        return 1

    def set_device(self, device: Any) -> None: ...

    def current_device(self) -> int:
        return 0

    def get_device_name(self, device: Any = None) -> str:
        return "CPU"

    def get_device_properties(self, device: Any = None) -> types.SimpleNamespace:
        return types.SimpleNamespace(total_memory=1 << 34, name="CPU")

    def memory_stats(self, device: Any = None) -> dict[str, int]:
        return {}

    def reset_peak_memory_stats(self) -> None: ...

    def empty_cache(self) -> None: ...

    def synchronize(self, device: Any = None) -> None: ...


def sums_on_gloo(model: nn.Module) -> nn.Module:
    """FSDP2 sums plainly; torchtitan's own factor is 1."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
    return model


engine_utils.device_type, engine_utils.device_module = "cpu", Cpu("cpu")
if not hasattr(torch.distributed, "set_timeout"):
    torch.distributed.set_timeout = lambda timeout, group=None: None  # type: ignore[attr-defined]
