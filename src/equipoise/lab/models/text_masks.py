"""Masks by token id for a model of the lab: drawn from its training text and its seed, taken from its checkpoints."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...external.routing_masks import mask_routers
from ...functional.routing_mask import draw_visible, rare_ids
from ...layers.router import Router
from ...layers.router_buffers import MASK_NAME

if TYPE_CHECKING:
    from ..config.schema import ModelConfig
    from ..data.packing import PackedData
    from .protocol import TrainableLM

__all__ = ["mask_by_text", "masks_in", "without_masks"]


def mask_by_text(model: TrainableLM, config: ModelConfig, data: PackedData, seed: int) -> None:
    """Masks the model's routers as its configuration says; without such settings it stays as it is.

    Each layer draws for itself, from a seed made of ``seed`` and its router's name.

    Args:
        config: with ``mask_rare`` and ``mask_visible``.
        data: the training text.
    """
    if not config.masked:
        return
    rare_V = rare_ids(torch.from_numpy(data.frequencies), config.mask_rare)
    masks = {}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            digest = hashlib.sha256(f"{seed}/{name}.{MASK_NAME}".encode()).digest()
            draw = int.from_bytes(digest[:7], "big")
            masks[name] = draw_visible(rare_V, config.experts, num_visible=config.mask_visible or None, seed=draw)
    mask_routers(model, masks)


def masks_in(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The masks in a state dict by the names of their routers.

    >>> masks_in({"gate.weight": torch.zeros(1), "gate.visible_experts": torch.ones(1, 1).bool()})
    {'gate': tensor([[True]])}
    """
    end = f".{MASK_NAME}"
    return {key.removesuffix(end): value for key, value in weights.items() if key.endswith(end)}


def without_masks(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The rest of it.

    >>> list(without_masks({"gate.weight": torch.zeros(1), "gate.visible_experts": torch.ones(1, 1).bool()}))
    ['gate.weight']
    """
    return {key: value for key, value in weights.items() if not key.endswith(f".{MASK_NAME}")}
