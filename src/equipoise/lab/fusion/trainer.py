"""One fusion run: from a configuration to a folder with its record and its checkpoints.

    record.jsonl          every number, see `equipoise.storage.run_record`; the domains are text and image
    checkpoints/step_*/   the two newest, see `equipoise.storage.checkpoint`

A run is a function of its configuration: killed at any moment and resumed, it gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from ...policies import Policy
from ...storage.run_record import Evaluation, Step
from ..training.small_run import SmallRun, train_small
from .config import FusionConfig
from .data import load_fused
from .evaluation import evaluate
from .model import FusionModel, active_parameters
from .strategies import MODALITIES, read_strategy

__all__ = ["TASK", "train"]

TASK = "text and images"


def train(
    config: FusionConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Path:
    """Trains one run into ``folder`` and returns the folder; see `train_small` for what it takes and raises."""
    return train_small(FusionRun, config, Path(folder), resume=resume, on_step=on_step)


class FusionRun(SmallRun):
    """Sequences of each step are drawn alike for all strategies of a seed."""

    task, told, config_type = TASK, "text and images", FusionConfig
    config: FusionConfig
    model: FusionModel

    def load(self) -> None:
        self.strategy = read_strategy(self.config.strategy)
        self.data = load_fused(self.config.data)

    @property
    def sha256(self) -> str:
        return self.data.sha256

    def build(self) -> FusionModel:
        return FusionModel(self.config.model, self.strategy, vocabulary=self.data.vocabulary.size,
                           seed=self.config.train.seed)  # fmt: skip

    def policies(self) -> Sequence[Policy] | None:
        return None if self.strategy.policies is None else self.strategy.build(self.config.train.steps)

    def loss(self, generator: torch.Generator) -> tuple[Tensor, int]:
        tokens_BS = self.data.draw(self.config.train.sequences, generator)
        read_BS, next_BS = tokens_BS[:, :-1], tokens_BS[:, 1:]
        return self.model(read_BS, next_BS, self.data.vocabulary.classes(read_BS)).mean(), next_BS.numel()

    def evaluation(self) -> Evaluation:
        train = self.config.train
        return evaluate(self.model, self.data, self.config.model, self.strategy, step=self.step,
                        sequences=train.eval_sequences, batch=train.sequences)  # fmt: skip

    def described(self) -> dict[str, Any]:
        model = self.config.model
        active = [active_parameters(self.model, model.capacity, name)[0] for name in MODALITIES]
        return {
            "policies": [repr(self.model.blocks[0].feed_forward)], "num_layers": model.layers,
            "num_experts": 1 if self.strategy.dense else model.experts, "top_k": max(1, round(model.capacity)),
            "domains": list(MODALITIES), "parameters": sum(p.numel() for p in self.model.parameters()),
            "active_parameters": round(fmean(active)),
        }  # fmt: skip
