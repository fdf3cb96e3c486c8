"""DeepSpeed on CPUs as several ranks of one machine: what it, or accelerate, would look for on GPUs."""

from __future__ import annotations

import os
import sys
from typing import Any

__all__ = ["as_rank", "install"]


def install() -> None:
    """Before transformers or deepspeed is imported."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401
    import transformers.training_args
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType
    from deepspeed.accelerator import get_accelerator

    own: Any = sys.modules["deepspeed.comm.torch"]  # as an attribute of its package it is torch itself
    own.build_shm_op = lambda: None  # minutes of C++ for a faster sum than gloo's
    type(get_accelerator()).is_fp16_supported = lambda _self: True  # slow, but torch has it

    def gloo(*_args: Any, **_named: Any) -> tuple[str, DistributedType]:
        return "gloo", DistributedType.MULTI_CPU

    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # with use_cpu there is no DeepSpeed
    PartialState._prepare_backend = gloo  # accelerate 1.15 sees no ranks under DeepSpeed where there is no GPU


def as_rank(rank: int, world: int, port: str) -> None:
    """What a launcher sets."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_SIZE": world, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
