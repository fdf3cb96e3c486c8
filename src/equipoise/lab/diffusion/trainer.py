"""One diffusion run: from a configuration to a folder with its record, its checkpoints and the images it draws.

    record.jsonl          every number, see `equipoise.storage.run_record`; the domains are noise levels
    checkpoints/step_*/   the two newest, see `equipoise.storage.checkpoint`
    samples.png           images of each class, a row a class, drawn at the end

A run is a function of its configuration: killed at any moment and resumed, it gives the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...balancer.balancer import Balancer
from ...layers import Experts
from ...policies import Policy
from ...storage.files import atomic_write
from ...storage.run_record import Evaluation, Step
from ..training.small_run import SmallRun, train_small
from .config import DiffusionConfig
from .evaluation import evaluate, level_names
from .flow import flow_loss, sample
from .images import load_images
from .model import DiT
from .png import encode_png, tile
from .strategies import read_strategy

__all__ = ["SAMPLES_NAME", "TASK", "train"]

SAMPLES_NAME = "samples.png"
TASK = "images"


def train(
    config: DiffusionConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Path:
    """Trains one run into ``folder`` and returns the folder; see `train_small` for what it takes and raises."""
    return train_small(DiffusionRun, config, Path(folder), resume=resume, on_step=on_step)


class DiffusionRun(SmallRun):
    """Images, noise and noise levels of each step are drawn alike for all strategies of a seed."""

    task, told, config_type = TASK, "images", DiffusionConfig
    config: DiffusionConfig
    model: DiT

    def load(self) -> None:
        self.strategy = read_strategy(self.config.strategy)
        self.images = load_images(self.config.data, self.config.model.patch)

    @property
    def sha256(self) -> str:
        return self.images.sha256

    def build(self) -> DiT:
        channels, side = self.images.shape
        return DiT(self.config.model, self.strategy, channels=channels, side=side, classes=len(self.images.classes),
                   seed=self.config.train.seed)  # fmt: skip

    def policies(self) -> Sequence[Policy] | None:
        return None if self.strategy.policies is None else self.strategy.build(self.config.train.steps)

    def balanced(self, policies: Sequence[Policy]) -> Balancer:
        size = self.config.train.images_per_micro_batch
        return Balancer(self.model, list(policies), optimizer=self.optimizer, sequences_per_micro_batch=size)

    def loss(self, generator: torch.Generator) -> tuple[Tensor, int]:
        count = self.config.train.images
        chosen_B = torch.randint(len(self.images.train), (count,), generator=generator)
        images, labels_B = self.images.train[chosen_B], self.images.train_labels[chosen_B]
        noise = torch.randn(images.shape, generator=generator)
        t_B = torch.rand(count, generator=generator)
        loss = flow_loss(self.model, images, labels_B, noise, t_B).mean()
        return loss, count * self.model.position.shape[0]

    def evaluation(self) -> Evaluation:
        train = self.config.train
        return evaluate(self.model, self.images, step=self.step, levels=train.levels, draws=train.draws,
                        images_per_micro_batch=train.images_per_micro_batch)  # fmt: skip

    def last(self) -> None:
        """Images of each class, from the same noise in all runs of a seed."""
        train, classes = self.config.train, len(self.images.classes)
        if not train.samples:
            return
        labels_B = torch.arange(classes).repeat_interleave(train.samples)
        channels, side = self.images.shape
        generator = torch.Generator().manual_seed(train.seed)
        noise = torch.randn(len(labels_B), channels, side, side, generator=generator)
        drawn = sample(self.model, noise, labels_B, train.sample_steps)
        pixels = ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
        atomic_write(self.folder / SAMPLES_NAME, encode_png(tile(list(pixels), train.samples)))

    def described(self) -> dict[str, Any]:
        model = self.config.model
        dense = self.strategy.pool is None and self.strategy.policies is None
        parameters = sum(p.numel() for p in self.model.parameters())
        experts = [p for m in self.model.modules() if isinstance(m, Experts) for p in m.parameters()]
        idle = sum(p.numel() for p in experts) * (1 - model.capacity / model.experts)
        return {
            "policies": [repr(self.model.blocks[1].feed_forward)], "num_layers": model.layers // 2,
            "num_experts": 1 if dense else model.experts, "top_k": max(1, round(model.capacity)),
            "domains": level_names(self.config.train.levels), "parameters": parameters,
            "active_parameters": parameters - round(idle),
        }  # fmt: skip
