"""Fused GPU kernels behind the same functions: Triton where it is installed, plain PyTorch elsewhere."""

from __future__ import annotations

from .availability import INTERPRETED, installed, usable
from .router import Chosen, RouterForm, choose_and_count, fits, router_gradient, summarize

__all__ = [
    "INTERPRETED",
    "Chosen",
    "RouterForm",
    "choose_and_count",
    "fits",
    "installed",
    "router_gradient",
    "summarize",
    "usable",
]
