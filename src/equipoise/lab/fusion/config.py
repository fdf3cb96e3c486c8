"""What a fusion run is made of: frozen dataclasses, from defaults < TOML file < command line, checked before use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import ConfigError
from ...functional.expert_choice import check_capacity
from ..config.loading import load_at
from ..config.numbers import above_zero

__all__ = ["QUICK", "FusionConfig", "FusionDataConfig", "ModelConfig", "TrainConfig", "read_config"]

QUICK: dict[str, Any] = {"train.steps": 60, "train.warmup": 10, "train.eval_every": 20}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer over tokens of text and of images; every layer has experts."""

    layers: int = 3
    width: int = 64
    heads: int = 4
    experts: int = 8  # of a layer, of all groups together
    image_experts: int = 4  # of these, where experts are in groups; the others are the text's
    hidden: int = 128  # of one expert, and of the feed-forward layers without experts
    capacity: float = 1.0  # experts that a token uses on average; for token choice a whole number
    predictor_coef: float = 1.0  # of the auxiliary routers' loss; it reaches nothing else

    def __post_init__(self) -> None:
        above_zero(self, "model.")
        if not 0 < self.image_experts < self.experts:
            raise ConfigError(
                expected="0 < model.image_experts < model.experts: both groups have experts",
                got=f"image_experts = {self.image_experts}, experts = {self.experts}",
                do="half of them is even",
            )
        check_capacity(min(self.image_experts, self.experts - self.image_experts), self.capacity)
        if self.width % (2 * self.heads):
            raise ConfigError(
                expected="an even model.width / model.heads",
                got=f"width = {self.width}, heads = {self.heads}",
                do="change one of them",
            )


@dataclass(frozen=True, kw_only=True)
class FusionDataConfig:
    """Which images and which text. Each sequence is an image with its class as a caption, and a piece of text."""

    data: str | None = None  # a folder of images, or one of such folders, each a class; None = scikit-learn's digits
    text: str | None = None  # a file or folder of text; None = what this installation holds
    size: int = 0  # pixels on a side that images are scaled and cut to; 0 = they are all of one size
    levels: int = 17  # greys that a pixel is rounded to, each a token; the digits have 17
    vocabulary: int = 512  # of the text's tokenizer, 256 bytes and more
    text_tokens: int = 66  # of each sequence, caption and all; an 8 x 8 image is 64 and its two marks
    held_out: float = 0.15  # share of the images that is not trained on

    def __post_init__(self) -> None:
        above_zero(self, "data.", "size")
        if self.held_out >= 1 or not 2 <= self.levels <= 256:
            raise ConfigError(
                expected="data.held_out below 1, and data.levels of 2 to 256, the greys of a pixel",
                got=f"held_out = {self.held_out}, levels = {self.levels}",
                do="0.15 and 17 are usual",
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how fast, and what is written down. A step is one forward of ``sequences`` sequences."""

    steps: int = 400
    sequences: int = 16
    lr: float = 3e-3
    min_lr_ratio: float = 0.05  # of lr, at the end of the cosine
    warmup: int = 40  # steps
    weight_decay: float = 0.0
    clip: float = 1.0  # of the gradient norm; 0 = none
    eval_every: int = 200  # steps; 0 = only at the end
    eval_sequences: int = 256  # held-out ones; no more than there are held-out images
    checkpoint_every: int = 100  # steps; 0 = only at the end
    threads: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        may_be_zero = ("min_lr_ratio", "warmup", "weight_decay", "clip", "eval_every", "checkpoint_every", "seed")
        above_zero(self, "train.", *may_be_zero)


@dataclass(frozen=True, kw_only=True)
class FusionConfig:
    """One run; ``strategy`` is a name that `strategies.read_strategy` knows."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: FusionDataConfig = field(default_factory=FusionDataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    strategy: str = "groups"


def read_config(path: Path | None = None, values: Mapping[str, Any] | None = None) -> FusionConfig:
    """From the defaults, then the TOML file at ``path``, then ``values`` {dotted name: value}.

    Raises ConfigError (unknown setting, wrong type, settings that exclude each other).

    >>> read_config(values={"train.steps": 10, "strategy": "mixed"}).train.steps
    10
    """
    return load_at(FusionConfig, path, values, "data", "text")
