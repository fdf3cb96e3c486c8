"""Where the kernels run: on a GPU with Triton, if EQUIPOISE_KERNELS=1 asks for it, or under Triton's interpreter."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["DEVICES", "INTERPRETED", "installed", "load", "usable"]

# Triton decides when a kernel is defined; so does this, once. Slow: for tests of the kernels without a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# They are right in the interpreter and have not run on a GPU yet: until they have, only where somebody asks for them.
WANTED = os.environ.get("EQUIPOISE_KERNELS") == "1"
DEVICES = {"cuda", "cpu"} if INTERPRETED else {"cuda"} if WANTED else set[str]()
# Looked for once and not in a cached function: a compiler that traces a router warns of those.
_INSTALLED = torch.version.hip is None and importlib.util.find_spec("triton") is not None


def usable(x: Tensor) -> bool:
    """Whether ``x`` lies where the kernels run. Where not, the same functions in plain PyTorch take over, unsaid.

    >>> usable(torch.ones(1)) == (INTERPRETED and installed())
    True
    """
    return x.device.type in DEVICES and installed()


def installed() -> bool:
    """Whether Triton can be imported; it is not imported for this.

    >>> isinstance(installed(), bool)
    True
    """
    return _INSTALLED


def load(name: str) -> Any:
    """A module of Triton kernels of this package; before the first launch none is imported."""
    return importlib.import_module(f"{__package__}.{name}")
