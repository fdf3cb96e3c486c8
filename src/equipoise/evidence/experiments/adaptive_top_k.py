"""Fewer experts by each layer's sensitivity, by one threshold, and in random layers, of a model that is trained once.

Its cases are strategies of the lab. What it finds are increases of held-out loss over that with all experts, for one
share of choices dropped: each is a measure, and a contrast compares two of them (``baseline_measure``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from ...adaptive import AdaptableModel, evaluate, measure_sensitivity
from ...adaptive.sweep import ALL, evaluate_at, random_layers
from ...errors import ConfigError
from ...lab.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from ...lab.config.strategies import strategy_of
from ...lab.data.packing import PackedData
from ...lab.models.pretrained import build, prepare_text
from ...lab.training.trainer import CHECKPOINTS, train
from ...storage import checkpoint
from ...storage.run_record import read_run
from ..experiment import Experiment, Outcome, Progress

__all__ = ["EXPERIMENT", "Settings"]

BATCH = 16  # windows at a time
NATS = "nats per token"
MEASURES = {
    "all experts": NATS,  # 0: what the others are increases over
    "by sensitivity": NATS,
    "by one threshold": NATS,
    "in random layers": NATS,
    "one expert": NATS,  # every token, every layer
    "order": "rank correlation of layers",  # predicted and measured increase of each layer alone with one expert
    "fewer by sensitivity": "share of choices",
    "fewer by one threshold": "share of choices",
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A model of the lab as evidence/base.toml has it but deeper, and how many of its choices are dropped."""

    layers: int = 6
    width: int = 64
    experts: int = 8
    top_k: int = 2
    expert_hidden: int = 64
    vocab_size: int = 2048
    sequence_length: int = 256
    steps: int = 240
    micro_batches: int = 32
    lr: float = 3e-3
    warmup: int = 20
    data: str | None = None
    fewer: float = 0.25  # share of all choices
    windows: int = 16  # of each domain for sensitivities, and as many others for losses
    draws: int = 8  # of random layers


def config_of(case: str, settings: Settings, seed: int) -> RunConfig:
    """The training behind a case."""
    return RunConfig(
        model=ModelConfig(
            layers=settings.layers, width=settings.width, heads=2, head_dim=32, experts=settings.experts,
            top_k=settings.top_k, expert_hidden=settings.expert_hidden, vocab_size=settings.vocab_size,
        ),
        data=DataConfig(data=settings.data, sequence_length=settings.sequence_length, mix="micro_batch"),
        train=TrainConfig(
            steps=settings.steps, micro_batches=settings.micro_batches, sequences_per_micro_batch=1, lr=settings.lr,
            min_lr_ratio=0.1, warmup=settings.warmup, weight_decay=0.1, precision="fp32", eval_every=0,
            eval_sequences=64, fidelity_every=0, threads=1, tensorboard=False, seed=seed,
        ),
        strategy=case,
    )  # fmt: skip


def check(case: str, settings: Settings) -> None:
    """Raises ConfigError for what cannot run."""
    strategy_of(config_of(case, settings, 0))
    if settings.top_k < 2 or not 0 < settings.fewer <= (settings.top_k - 1) / settings.top_k:
        raise ConfigError(
            expected="top_k of 2 or more, and fewer = a share of choices that leaves each token one expert",
            got=f"top_k = {settings.top_k}, fewer = {settings.fewer:g}",
            do="0.25 is what AdapMoE says it drops",
        )
    if min(settings.windows, settings.draws) < 1:
        raise ConfigError(
            expected="windows and draws of 1 or more",
            got=f"windows = {settings.windows}, draws = {settings.draws}",
            do="leave them out",
        )


def corpus(settings: Settings, progress: Progress) -> str:
    """Of the text that the model is trained on."""
    config = config_of("none", settings, 0)
    return prepare_text(config.model, config.data, progress).corpus_sha256[:12]


def run(case: str, settings: Settings, seed: int, folder: Path) -> Outcome:
    """Trains, then drops the same share of choices in each way. A training that was stopped goes on."""
    config = config_of(case, settings, seed)
    trained = train(config, folder / "run", resume=True)
    found = checkpoint.load_latest(trained / CHECKPOINTS)
    assert found is not None, "a training ends with a checkpoint"
    lm = build(config)
    lm.load_state_dict(found[1]["model"])
    lm.eval()
    data = prepare_text(config.model, config.data)
    record = read_run(trained)
    return Outcome(
        numbers=_measured(AdaptableModel.of(lm, lm), data, settings, seed),
        loss=record.evaluations[-1].loss,
        tokens=record.end.tokens if record.end else 0,
    )


def _measured(model: AdaptableModel, data: PackedData, settings: Settings, seed: int) -> dict[str, float]:
    profile = measure_sensitivity(model, _batches(data, 0, settings.windows), seed=seed)
    held = _batches(data, settings.windows, 2 * settings.windows)
    before = evaluate(model, held).loss
    ways = {
        "by sensitivity": evaluate_at(model, profile, held, settings.fewer),
        "by one threshold": evaluate_at(model, profile, held, settings.fewer, sensitive=False),
    }
    names = list(model.routers)
    share = settings.fewer * settings.top_k / (settings.top_k - 1)  # of the layers, with one expert a token
    at_random = [_loss(model, held, random_layers(names, share, seed * settings.draws + draw))
                 for draw in range(settings.draws)]  # fmt: skip
    alone = [_loss(model, held, {other: ALL if other == name else 0.0 for other in names}) - before for name in names]
    order: Any = stats.spearmanr([profile.alone[name] for name in names], alone) if len(names) > 1 else [math.nan]
    return {
        "all experts": 0.0,
        **{name: one.loss - before for name, one in ways.items()},
        "in random layers": fmean(at_random) - before,
        "one expert": _loss(model, held, dict.fromkeys(names, ALL)) - before,
        "order": float(order[0]),
        **{f"fewer {name}": one.fewer(model) for name, one in ways.items()},
    }


def _loss(model: AdaptableModel, held: list[Tensor], thresholds: Any) -> float:
    with model.dropping(thresholds):
        return evaluate(model, held).loss


def _batches(data: PackedData, first: int, last: int) -> list[Tensor]:
    """Held-out windows of every domain, (B, S + 1)."""
    rows = [torch.from_numpy(data.heldout[domain][first:last].astype("int64")) for domain in data.domains]
    return list(torch.cat(rows).split(BATCH))


EXPERIMENT = Experiment(settings=Settings, measures=MEASURES, check=check, corpus=corpus, run=run)
