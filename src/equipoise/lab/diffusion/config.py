"""What a diffusion run is made of: frozen dataclasses, from defaults < TOML file < command line, checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError, unknown_name
from ...functional.expert_choice import check_capacity
from ..config.loading import load_at
from ..config.numbers import above_zero

__all__ = ["CHECKPOINTING", "QUICK", "DiffusionConfig", "ImageConfig", "ModelConfig", "TrainConfig", "read_config"]

CHECKPOINTING = ("none", "reentrant", "non_reentrant")
QUICK: dict[str, Any] = {"train.steps": 60, "train.warmup": 10, "train.eval_every": 20, "train.sample_steps": 10}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A diffusion transformer (DiT, arXiv 2212.09748): every second layer has experts, as in DiffMoE."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    patch: int = 2  # pixels on a side that make one token
    experts: int = 8
    hidden: int = 128  # of one expert, and of the feed-forward layers without experts
    capacity: float = 1.0  # experts that a token uses on average; for token choice a whole number
    predictor_coef: float = 1.0  # of the capacity predictor's loss, as in the released configuration
    checkpointing: str = "none"  # recompute layers in backward

    def __post_init__(self) -> None:
        above_zero(self, "model.", "predictor_coef")
        check_capacity(self.experts, self.capacity)
        if self.checkpointing not in CHECKPOINTING:
            raise unknown_name("kind of checkpointing", self.checkpointing, CHECKPOINTING)
        if self.layers < 2 or self.width % (2 * self.heads):
            raise ConfigError(
                expected="model.layers of 2 or more, and an even model.width / model.heads",
                got=f"layers = {self.layers}, width = {self.width}, heads = {self.heads}",
                do="the second layer is the first with experts; change width or heads",
            )


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """Which images. ``data`` is None for the handwritten digits that scikit-learn ships."""

    data: str | None = None  # a folder of images, or one of such folders, each a class
    size: int = 0  # pixels on a side that images are scaled and cut to; 0 = they are all of one size
    held_out: float = 0.15  # share of the images that is not trained on

    def __post_init__(self) -> None:
        above_zero(self, "data.", "size")
        if self.size and self.data is None:
            raise ConfigError(
                expected="data.size with a folder of images: it scales these",
                got=f"size = {self.size} for the digits of scikit-learn, which are 8 x 8",
                do="name the folder with --data, or leave data.size out",
            )
        if self.held_out >= 1:
            raise ConfigError(expected="data.held_out below 1", got=f"held_out = {self.held_out}", do="0.15 is usual")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast, and what is written down. A step is one forward of ``images`` images."""

    steps: int = 1200
    images: int = 128
    images_per_micro_batch: int = 16  # that the scope "micro_batch" of a balance loss sees together
    lr: float = 2e-3
    min_lr_ratio: float = 0.05  # of lr, at the end of the cosine
    warmup: int = 50  # steps
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient norm; 0 = none
    eval_every: int = 200  # steps; 0 = only at the end
    levels: int = 10  # noise levels at which held-out images are evaluated
    draws: int = 2  # of noise for each held-out image and level
    samples: int = 8  # images of each class that are drawn at the end; 0 = none
    sample_steps: int = 50  # of Euler's method, from noise to image
    checkpoint_every: int = 200  # steps; 0 = only at the end
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        above_zero(
            self,
            "train.",
            "min_lr_ratio",
            "warmup",
            "weight_decay",
            "clip",
            "eval_every",
            "samples",
            "checkpoint_every",
            "seed",
        )
        if self.images % self.images_per_micro_batch:
            raise ConfigError(
                expected="train.images that train.images_per_micro_batch divides",
                got=f"images = {self.images}, images_per_micro_batch = {self.images_per_micro_batch}",
                do="change one of them",
            )


@dataclass(frozen=True, kw_only=True)
class DiffusionConfig:
    """One run; ``strategy`` is a name that `strategies.read_strategy` knows."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: ImageConfig = field(default_factory=ImageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: str = "batch"


def read_config(path: Path | None = None, values: Mapping[str, Any] | None = None) -> DiffusionConfig:
    """From the defaults, then the TOML file at ``path``, then ``values`` {dotted name: value}.

    Raises ConfigError (unknown setting, wrong type, settings that exclude each other).

    >>> read_config(values={"train.steps": 10, "strategy": "sample"}).train.steps
    10
    """
    return load_at(DiffusionConfig, path, values, "data")
