"""Small transformers over text and digits in one sequence: losses by modality, loads, and auxiliary routers.

Its cases are strategies of `equipoise fuse`. Of one seed data and the weights of all other layers are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...lab.fusion.comparison import check as check_pool
from ...lab.fusion.config import FusionConfig, FusionDataConfig, ModelConfig, TrainConfig
from ...lab.fusion.data import load_fused
from ...lab.fusion.numbers import MEASURES, numbers_of
from ...lab.fusion.strategies import read_strategy
from ...lab.fusion.trainer import TASK, train
from ...storage.run_record import read_run
from ..experiment import Experiment, Outcome, Progress

__all__ = ["EXPERIMENT", "Settings"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and the training of `equipoise fuse`, with every number written out; ``data`` is a folder of images."""

    layers: int = 3
    width: int = 64
    heads: int = 4
    experts: int = 8
    image_experts: int = 4
    hidden: int = 128
    capacity: float = 1.0
    vocabulary: int = 512
    text_tokens: int = 66
    levels: int = 17
    steps: int = 400
    sequences: int = 16
    lr: float = 3e-3
    warmup: int = 40
    eval_sequences: int = 256
    text: str | None = None
    data: str | None = None


def config_of(case: str, settings: Settings, seed: int) -> FusionConfig:
    """The run behind a case."""
    return FusionConfig(
        model=ModelConfig(
            layers=settings.layers, width=settings.width, heads=settings.heads, experts=settings.experts,
            image_experts=settings.image_experts, hidden=settings.hidden, capacity=settings.capacity,
            predictor_coef=1.0,
        ),
        data=_data_of(settings),
        train=TrainConfig(
            steps=settings.steps, sequences=settings.sequences, lr=settings.lr, min_lr_ratio=0.05,
            warmup=settings.warmup, weight_decay=0.0, clip=1.0, eval_every=0, eval_sequences=settings.eval_sequences,
            checkpoint_every=200, threads=1, seed=seed,
        ),
        strategy=case,
    )  # fmt: skip


def _data_of(settings: Settings) -> FusionDataConfig:
    return FusionDataConfig(data=settings.data, text=settings.text, vocabulary=settings.vocabulary, held_out=0.15,
                            text_tokens=settings.text_tokens, levels=settings.levels)  # fmt: skip


def check(case: str, settings: Settings) -> None:
    """Raises ConfigError for what cannot run."""
    read_strategy(case).layer(config_of(case, settings, 0).model)


def corpus(settings: Settings, progress: Progress) -> str:
    """Of the text and the images."""
    progress("reading text and images", 0.0)
    return load_fused(_data_of(settings)).sha256[:12]


def run(case: str, settings: Settings, seed: int, folder: Path) -> Outcome:
    """Trains and evaluates. A training that was stopped goes on."""
    config = config_of(case, settings, seed)
    check_pool(config, load_fused(config.data))
    record = read_run(train(config, folder / "run", resume=True), TASK)
    last = record.evaluations[-1]
    numbers = numbers_of(last, read_strategy(case).open_to(config.model))
    return Outcome(numbers=numbers, loss=last.loss, tokens=record.end.tokens if record.end else 0)


EXPERIMENT = Experiment(settings=Settings, measures=MEASURES, check=check, corpus=corpus, run=run)
