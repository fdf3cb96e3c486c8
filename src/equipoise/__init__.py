"""Load balancing for mixture-of-experts training, exact for every way to cut a batch."""

from __future__ import annotations

import importlib
from types import ModuleType

from .autograd.token_layout import TokenLayout
from .balancer.balancer import Balancer
from .distributed import Ranks
from .errors import ConfigError, DataError, EquipoiseError, InputError, OutputError, StateError
from .external.adaptive_top_k import apply_adaptive_top_k
from .external.carrier import RouterCarrier
from .external.registry import register_router
from .external.routing_masks import load_masks, mask_routers, routing_masks, save_masks, unmask_routers
from .functional.convert import convert_coef
from .functional.routing import Routing
from .layers import (
    ExpertChoiceMoE,
    Experts,
    ModalityMoE,
    MoE,
    Router,
    TokenPools,
    choose_from_pools,
    clip_grad_norm_,
    shard_experts,
)
from .policies import AuxLoss, EntropyLoss, ExpertBias, Ratio, Sequences, Switch, Target, ZLoss
from .replay import RoutingRecord, record_routing, replay_routing

__version__ = "0.1.0"

__all__ = [
    "AuxLoss",
    "Balancer",
    "ConfigError",
    "DataError",
    "EntropyLoss",
    "EquipoiseError",
    "ExpertBias",
    "ExpertChoiceMoE",
    "Experts",
    "InputError",
    "MoE",
    "ModalityMoE",
    "OutputError",
    "Ranks",
    "Ratio",
    "Router",
    "RouterCarrier",
    "Routing",
    "RoutingRecord",
    "Sequences",
    "StateError",
    "Switch",
    "Target",
    "TokenLayout",
    "TokenPools",
    "ZLoss",
    "apply_adaptive_top_k",
    "choose_from_pools",
    "clip_grad_norm_",
    "convert_coef",
    "load_masks",
    "mask_routers",
    "record_routing",
    "register_router",
    "replay_routing",
    "routing_masks",
    "save_masks",
    "shard_experts",
    "unmask_routers",
]


def __getattr__(name: str) -> ModuleType:
    """These are loaded when they are first named: who trains without them does not pay for them."""
    if name in ("adapters", "plot"):
        return importlib.import_module(f"equipoise.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
