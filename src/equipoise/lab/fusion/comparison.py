"""Strategies side by side: runs of one seed share their data and the weights of all but feed-forward layers."""

from __future__ import annotations

from collections.abc import Sequence

from ...functional.expert_choice import tokens_per_expert
from ..comparison.side_by_side import Room
from .config import FusionConfig
from .data import Fused, load_fused
from .strategies import read_strategy
from .trainer import TASK, train

__all__ = ["ROOM", "check"]


def check(config: FusionConfig, data: Fused) -> None:
    """Raises InputError for experts that would choose from too few tokens of their group."""
    strategy = read_strategy(config.strategy)
    strategy.layer(config.model)
    if strategy.experts_choose:  # the least that a step may have of each: captions and words, pixels and marks
        image, sequences = data.train.images.shape[1] + 1, config.train.sequences
        text = data.length - image - 1
        for tokens, experts in zip((text, image), strategy.open_to(config.model), strict=True):
            tokens_per_expert(sequences * tokens, len(experts), config.model.capacity)


def _check(configs: Sequence[FusionConfig]) -> None:
    data = load_fused(configs[0].data)
    for config in configs:
        check(config, data)


ROOM = Room(
    command="fuse",
    task=TASK,
    config_type=FusionConfig,
    named=lambda config: read_strategy(config.strategy).layer(config.model),
    check=_check,
    train=train,
    example="mixed,groups",
)
