"""Layers that any model can use: Router, Experts and the dropless MoE made of them."""

from __future__ import annotations

from .clip import clip_grad_norm_
from .experts import Experts, shard_experts
from .moe import MoE, SwiGLU
from .router import Router

__all__ = ["Experts", "MoE", "Router", "SwiGLU", "clip_grad_norm_", "shard_experts"]
