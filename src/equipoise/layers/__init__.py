"""Layers that any model can use: Router, Experts and the dropless MoE made of them."""

from __future__ import annotations

from .clip import clip_grad_norm_
from .expert_parallel import shard_experts
from .experts import Experts
from .moe import MoE, SwiGLU
from .router import Router

__all__ = ["Experts", "MoE", "Router", "SwiGLU", "clip_grad_norm_", "shard_experts"]
