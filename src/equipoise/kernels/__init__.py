"""Fused GPU kernels behind the same functions: Triton where it is installed and wanted, plain PyTorch elsewhere."""

from __future__ import annotations

from .availability import INTERPRETED, installed, usable
from .experts import experts_fit, fused_experts
from .gate import gate_fits, gate_logits
from .router import STATISTICS, Chosen, RouterForm, choose_and_count, fits, router_gradient, summarize

__all__ = [
    "INTERPRETED",
    "STATISTICS",
    "Chosen",
    "RouterForm",
    "choose_and_count",
    "experts_fit",
    "fits",
    "fused_experts",
    "gate_fits",
    "gate_logits",
    "installed",
    "router_gradient",
    "summarize",
    "usable",
]
