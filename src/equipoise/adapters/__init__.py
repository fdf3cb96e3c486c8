"""Other libraries' trainers: their types in, a Balancer at work."""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = []  # `import *` would ask for every library at once
ADAPTERS = ("automodel", "axolotl", "deepspeed", "hf", "lightning", "llamafactory", "megatron", "ms_swift", "olmo_core",
            "torchtitan")  # fmt: skip


def __getattr__(name: str) -> ModuleType:
    """``equipoise.adapters.hf`` after ``import equipoise``: each asks for its library when it is first named."""
    if name in ADAPTERS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
