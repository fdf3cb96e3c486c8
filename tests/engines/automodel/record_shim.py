"""What models of NeMo Automodel need without CUDA: they build rotary embeddings on "cuda:..." whatever is configured.

torch says "cpu" instead; nothing of Automodel is changed. Its MoE layers need no such help.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def install() -> None:
    torch.cuda.current_device = lambda: 0
    CpuForCuda().__enter__()
