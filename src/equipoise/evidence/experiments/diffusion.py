"""Small diffusion transformers on digits: errors by noise level, and which experts compute which level.

Its cases are strategies of `equipoise diffuse`. Of one seed weights, images, noise and noise levels are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from ...lab.diffusion.comparison import check as check_pool
from ...lab.diffusion.config import DiffusionConfig, ImageConfig, ModelConfig, TrainConfig
from ...lab.diffusion.images import load_images
from ...lab.diffusion.strategies import read_strategy
from ...lab.diffusion.trainer import TASK, train
from ...storage.run_record import Evaluation, read_run
from ..experiment import Experiment, Outcome, Progress

__all__ = ["EXPERIMENT", "Settings"]

ERROR = "squared error of the velocity per pixel"
EXPERTS = "experts per token"
THIRDS = ("clean", "middle", "noisy")  # of the noise levels
MEASURES = {
    "error": f"{ERROR}, mean over noise levels",
    **{f"error {third}": f"{ERROR}, {third} third of the levels" for third in THIRDS},
    **{f"experts {third}": f"{EXPERTS}, {third} third of the levels" for third in THIRDS},
    "experts clean - noisy": f"{EXPERTS}, clean third less noisy third",
    "experts": f"{EXPERTS}, mean over noise levels",
    "information": "nats between expert and noise level",
    "maxvio": "of all held-out tokens",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and the training of `equipoise diffuse`, with every number written out; ``data`` is a folder."""

    layers: int = 4
    width: int = 64
    heads: int = 4
    patch: int = 2
    experts: int = 8
    hidden: int = 128
    capacity: float = 1.0
    steps: int = 800
    images: int = 128
    images_per_micro_batch: int = 16
    lr: float = 2e-3
    warmup: int = 50
    levels: int = 12
    draws: int = 4  # of noise for each held-out image and level
    data: str | None = None


def config_of(case: str, settings: Settings, seed: int) -> DiffusionConfig:
    """The run behind a case."""
    return DiffusionConfig(
        model=ModelConfig(
            layers=settings.layers, width=settings.width, heads=settings.heads, patch=settings.patch,
            experts=settings.experts, hidden=settings.hidden, capacity=settings.capacity, predictor_coef=1.0,
        ),
        data=ImageConfig(data=settings.data, held_out=0.15),
        train=TrainConfig(
            steps=settings.steps, images=settings.images, images_per_micro_batch=settings.images_per_micro_batch,
            lr=settings.lr, min_lr_ratio=0.05, warmup=settings.warmup, weight_decay=0.0, clip=1.0, eval_every=0,
            levels=settings.levels, draws=settings.draws, samples=0, checkpoint_every=200, threads=1, seed=seed,
        ),
        strategy=case,
    )  # fmt: skip


def check(case: str, settings: Settings) -> None:
    """Raises ConfigError for what cannot run."""
    read_strategy(case).layer(config_of(case, settings, 0).model)


def corpus(settings: Settings, progress: Progress) -> str:
    """Of the images."""
    progress("reading images", 0.0)
    return load_images(ImageConfig(data=settings.data, held_out=0.15), settings.patch).sha256[:12]


def run(case: str, settings: Settings, seed: int, folder: Path) -> Outcome:
    """Trains and evaluates. A training that was stopped goes on."""
    config = config_of(case, settings, seed)
    check_pool(config, load_images(config.data, config.model.patch))
    record = read_run(train(config, folder / "run", resume=True), TASK)
    return Outcome(numbers=numbers_of(record.evaluations[-1]), tokens=record.end.tokens if record.end else 0)


def numbers_of(found: Evaluation) -> dict[str, float]:
    """The measures of an evaluation. Experts per token are means over layers."""
    tokens_D = np.array(list(found.tokens.values()))
    experts_D = np.asarray(found.counts).sum(axis=2).mean(axis=1) / tokens_D
    errors = dict(zip(THIRDS, np.array_split(list(found.loss.values()), 3), strict=True))
    experts = dict(zip(THIRDS, np.array_split(experts_D, 3), strict=True))
    return {
        "error": found.mean_loss,
        **{f"error {third}": float(errors[third].mean()) for third in THIRDS},
        **{f"experts {third}": float(experts[third].mean()) for third in THIRDS},
        "experts clean - noisy": float(experts["clean"].mean() - experts["noisy"].mean()),
        "experts": float(experts_D.mean()),
        "information": fmean(found.mutual_information),
        "maxvio": fmean(found.maxvio_global),
    }


EXPERIMENT = Experiment(settings=Settings, measures=MEASURES, check=check, corpus=corpus, run=run)
