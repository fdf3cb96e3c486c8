"""What megatron-core 0.16.1 needs on a machine without CUDA; its own code is not changed but for one name it forgot.

Its constructors ask `torch.cuda.current_device`, a few calls say device="cuda", and recomputation saves the random
state of CUDA. Public settings do the rest: see `record_megatron.config_of`.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class CpuForCuda(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:  # its optimizers know CUDA's names alone
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


def install() -> None:
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device="cuda": torch.get_rng_state()
    CpuForCuda().__enter__()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.transformer.moe import moe_utils
    if not hasattr(moe_utils, "te_general_gemm"):  # asked for, and bound only where Transformer Engine is installed
        moe_utils.te_general_gemm = None
