"""Layers that any model can use: Router, Experts and the dropless MoE made of them; and layers whose experts choose."""

from __future__ import annotations

from .clip import clip_grad_norm_
from .expert_choice import ExpertChoiceMoE, choose_from_pools
from .experts import Experts, shard_experts
from .modality import ModalityMoE
from .moe import MoE, SwiGLU
from .router import Router
from .token_pools import TokenPools

__all__ = [
    "ExpertChoiceMoE",
    "Experts",
    "MoE",
    "ModalityMoE",
    "Router",
    "SwiGLU",
    "TokenPools",
    "choose_from_pools",
    "clip_grad_norm_",
    "shard_experts",
]
