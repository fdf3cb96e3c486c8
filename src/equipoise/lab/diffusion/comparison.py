"""Strategies side by side: runs of one seed share weights, images and noise, and differ in their second layers."""

from __future__ import annotations

from collections.abc import Sequence

from ...errors import ConfigError
from ...functional.expert_choice import tokens_per_expert
from ..comparison.side_by_side import Room
from .config import DiffusionConfig
from .images import Images, load_images
from .strategies import read_strategy
from .trainer import SAMPLES_NAME, TASK, train

__all__ = ["ROOM", "check"]


def check(config: DiffusionConfig, images: Images) -> None:
    """Raises InputError for a pool smaller than its experts, ConfigError for one that no batch can be cut into."""
    pool = read_strategy(config.strategy).pool
    if pool is None:
        return
    samples = {"sample": 1, "global_batch": config.train.images}.get(str(pool), pool)
    assert isinstance(samples, int)
    if config.train.images % samples:
        raise ConfigError(
            expected="pools that train.images divides into",
            got=f"{config.strategy} with images = {config.train.images}",
            do="change one of them",
        )
    tokens_per_expert(samples * (images.shape[1] // config.model.patch) ** 2, config.model.experts,
                      config.model.capacity)  # fmt: skip


def _check(configs: Sequence[DiffusionConfig]) -> None:
    images = load_images(configs[0].data, configs[0].model.patch)
    for config in configs:
        check(config, images)


ROOM = Room(
    command="diffuse",
    task=TASK,
    config_type=DiffusionConfig,
    named=lambda config: read_strategy(config.strategy).layer(config.model),
    check=_check,
    train=train,
    files=(SAMPLES_NAME,),
    example="sample,batch",
)
