"""One diffusion run: from a configuration to a folder with its record, its checkpoints and the images it draws.

    record.jsonl          every number, see `equipoise.storage.run_record`; the domains are noise levels
    checkpoints/step_*/   the two newest, see `equipoise.storage.checkpoint`
    samples.png           images of each class, a row a class, drawn at the end

A run is a function of its configuration: killed at any moment and resumed, it gives the same numbers.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from ... import __version__
from ...balancer.balancer import Balancer
from ...errors import ConfigError, DataError, InputError, OutputError, StateError
from ...layers import Experts, TokenPools
from ...report.data.run_view import flatten
from ...storage import checkpoint
from ...storage.codec import encode
from ...storage.files import atomic_write, output_errors
from ...storage.run_record import RECORD_NAME, End, Header, RecordWriter, Step, read_run
from ..config.loading import from_dict
from ..training.process import keep_freed_memory, peak_memory, stop_signals, threads
from ..training.trainer import learning_rate
from .config import DiffusionConfig
from .evaluation import evaluate, level_names
from .flow import flow_loss, sample
from .images import Images, load_images
from .model import DiT
from .png import encode_png, tile
from .strategies import read_strategy

__all__ = ["SAMPLES_NAME", "TASK", "train"]

SAMPLES_NAME = "samples.png"
TASK = "images"
STEP_SEEDS = 1_000_003  # apart: seed · this + step is the seed of a step's images, noise and levels


def train(
    config: DiffusionConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
) -> Path:
    """Trains one run into ``folder`` and returns the folder.

    Args:
        resume: go on from the newest whole checkpoint, or begin where there is none, instead of refusing a folder that
            holds a run. A finished run is left as it is.
        on_step: called with each step's record after it was written.

    Ctrl-C and SIGTERM end the step at hand, save and raise KeyboardInterrupt.

    Raises:
        OutputError: a folder that holds a run or cannot be written.
        ConfigError: another configuration than the run began with, or one that cannot work.
        DataError: images or checkpoints that cannot be read, or other images than the run began with.
        InputError: a pool that is smaller than the experts that choose from it.
        StateError: the loss or a gradient became NaN or infinite.
    """
    folder = Path(folder)
    earlier, finished = _earlier_run(config, folder, resume)
    if finished:
        return folder
    keep_freed_memory()
    with threads(config.train.threads):
        run = _Run(config, folder, earlier)
        with stop_signals() as stop:
            try:
                while run.step < config.train.steps and not stop.is_set():
                    record = run.train_step()
                    if on_step is not None:
                        on_step(record)
                    run.after_step()
                run.finish()
            except BaseException as error:
                run.fail(error)
                raise
            finally:
                run.close()
    if run.step < config.train.steps:
        raise KeyboardInterrupt
    return folder


class _Run:
    """What a run holds between two steps."""

    def __init__(self, config: DiffusionConfig, folder: Path, earlier: Header | None) -> None:
        self.config, self.folder = config, folder
        self.strategy = read_strategy(config.strategy)
        self.images = load_images(config.data, config.model.patch)
        self.model = _model(config, self.images)
        train = config.train
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay,
                                           betas=(0.9, 0.99), fused=True)  # fmt: skip
        self.pools = TokenPools(self.model, self.optimizer) if self.strategy.pool is not None else None
        self.balancer: Balancer | None = None
        policies = []
        if self.strategy.policies is not None:
            policies = self.strategy.build(train.steps)
            self.balancer = Balancer(self.model, policies, optimizer=self.optimizer,
                                     sequences_per_micro_batch=train.images_per_micro_batch)  # fmt: skip
        self.step, self.saved, self.seconds, self.tokens = 0, 0, 0.0, 0
        if earlier is not None:
            if earlier.corpus_sha256 != self.images.sha256:
                raise DataError(expected="the images that the run began with", got="images with another checksum",
                                do="bring back the old files, or train into a new folder")  # fmt: skip
            if (found := checkpoint.load_latest(folder / checkpoint.FOLDER)) is not None:
                self._restore(*found)
        with output_errors(f"the folder {folder}", "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
        self.writer = RecordWriter(folder, keep_until=self.step if self.step else -1)
        self.writer.write(self._header([repr(policy) for policy in policies]))

    def train_step(self) -> Step:
        train, began = self.config.train, time.perf_counter()
        rate = learning_rate(cast(Any, train), self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator().manual_seed(train.seed * STEP_SEEDS + self.step)
        chosen_B = torch.randint(len(self.images.train), (train.images,), generator=generator)
        images, labels_B = self.images.train[chosen_B], self.images.train_labels[chosen_B]
        noise = torch.randn(images.shape, generator=generator)
        t_B = torch.rand(train.images, generator=generator)
        try:
            loss = flow_loss(self.model, images, labels_B, noise, t_B).mean()
        except InputError as error:
            if "finite" not in error.expected:
                raise
            raise self._not_finite(error.got) from None
        metrics = self._backward(loss)
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), train.clip or math.inf))
        if not math.isfinite(loss.item() + norm):
            raise self._not_finite(f"loss {loss.item()}, gradient norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.balancer is not None:
            metrics = self.balancer.metrics()
        self.step += 1
        tokens, seconds = train.images * self.model.position.shape[0], time.perf_counter() - began
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        record = Step(self.step, loss.item(), rate, norm, tokens, seconds, metrics)
        self.writer.write(record)
        return record

    def after_step(self) -> None:
        """The evaluation that is due, and behind it the checkpoint."""
        train, last = self.config.train, self.step == self.config.train.steps
        if last or _due(self.step, train.eval_every):
            self.writer.write(
                evaluate(self.model, self.images, step=self.step, levels=train.levels, draws=train.draws,
                         images_per_micro_batch=train.images_per_micro_batch)
            )  # fmt: skip
        if last or _due(self.step, train.checkpoint_every):
            self.save()

    def save(self) -> None:
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "seconds": self.seconds,
                 "tokens": self.tokens, "balancer": self.balancer.state_dict() if self.balancer else {}}  # fmt: skip
        checkpoint.save(self.folder / checkpoint.FOLDER, self.step, state)
        self.saved = self.step

    def finish(self) -> None:
        """Ends a run after its last step, or between two steps when a stop was requested."""
        if self.saved < self.step:
            self.save()
        done = self.step == self.config.train.steps
        if done and self.config.train.samples:
            self._draw()
        self.writer.write(self._end("finished" if done else "interrupted"))

    def fail(self, error: BaseException) -> None:
        with contextlib.suppress(OutputError):
            stopped = isinstance(error, KeyboardInterrupt)
            self.writer.write(self._end("interrupted" if stopped else "failed", str(error) or type(error).__name__))

    def close(self) -> None:
        if self.balancer is not None:
            self.balancer.remove()
        self.writer.close()

    def _backward(self, loss: Tensor) -> dict[str, float]:
        if self.balancer is not None:
            self.balancer.tap(loss).backward()
            return {}
        if self.pools is None:
            loss.backward()
            return {}
        predictors = self.pools.loss()
        (loss + self.config.model.predictor_coef * predictors).backward()
        return {"predictor/loss": predictors.item()}

    def _draw(self) -> None:
        """Images of each class, from the same noise in all runs of a seed."""
        train, classes = self.config.train, len(self.images.classes)
        labels_B = torch.arange(classes).repeat_interleave(train.samples)
        channels, side = self.images.shape
        generator = torch.Generator().manual_seed(train.seed)
        noise = torch.randn(len(labels_B), channels, side, side, generator=generator)
        drawn = sample(self.model, noise, labels_B, train.sample_steps)
        pixels = ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(1, -1).numpy()
        atomic_write(self.folder / SAMPLES_NAME, encode_png(tile(list(pixels), train.samples)))

    def _restore(self, step: int, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        plain = state["optimizer"]
        plain["state"] = {int(at): held for at, held in plain["state"].items()}  # JSON has no number as a key
        self.optimizer.load_state_dict(plain)
        if self.balancer is not None:
            self.balancer.load_state_dict(state["balancer"])
        self.step = self.saved = step
        self.seconds, self.tokens = state["seconds"], state["tokens"]

    def _not_finite(self, got: str) -> StateError:
        """Saves the weights that the failed step started from."""
        if self.balancer is not None:
            self.balancer.discard()
        if self.saved < self.step:
            self.save()
        return StateError(expected=f"a finite loss and gradient at step {self.step + 1}", got=got,
                          do=f"lower train.lr or raise train.warmup; the weights after step {self.saved} are in "
                             f"{self.folder / checkpoint.FOLDER}")  # fmt: skip

    def _header(self, policies: list[str]) -> Header:
        model, train = self.config.model, self.config.train
        dense = self.strategy.pool is None and self.strategy.policies is None
        parameters = sum(p.numel() for p in self.model.parameters())
        experts = [p for m in self.model.modules() if isinstance(m, Experts) for p in m.parameters()]
        idle = sum(p.numel() for p in experts) * (1 - model.capacity / model.experts)
        return Header(
            strategy=self.strategy.name, policies=policies or [repr(self.model.blocks[1].feed_forward)],
            seed=train.seed, config=encode(self.config), num_layers=model.layers // 2,
            num_experts=1 if dense else model.experts, top_k=max(1, round(model.capacity)),
            domains=level_names(train.levels), corpus_sha256=self.images.sha256,
            versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                      "equipoise": __version__},
            parameters=parameters, active_parameters=parameters - round(idle),
            started=datetime.now(UTC).isoformat(timespec="seconds"), resumed_at=self.step, task=TASK,
        )  # fmt: skip

    def _end(self, status: str, message: str = "") -> End:
        return End(self.step, status, self.seconds, self.tokens, peak_memory(), message)


def _model(config: DiffusionConfig, images: Images) -> DiT:
    channels, side = images.shape
    return DiT(config.model, read_strategy(config.strategy), channels=channels, side=side,
               classes=len(images.classes), seed=config.train.seed)  # fmt: skip


def _earlier_run(config: DiffusionConfig, folder: Path, resume: bool) -> tuple[Header | None, bool]:
    """Header of the run in ``folder``, checked against ``config``, and whether that run is finished."""
    if not (folder / RECORD_NAME).exists():
        return None, False
    if not resume:
        raise OutputError(expected=f"a folder without a run: {folder}", got=f"one that holds {RECORD_NAME}",
                          do="choose another folder, or go on with this run: --continue in a command")  # fmt: skip
    try:
        run = read_run(folder, TASK)
    except DataError:
        return None, False  # killed before its first line was complete: nothing was trained
    before, wanted = (
        json.loads(json.dumps(flatten(encode(one)))) for one in (from_dict(DiffusionConfig, run.header.config), config)
    )
    if differ := sorted(name for name in wanted if before.get(name) != wanted[name]):
        raise ConfigError(expected=f"the configuration that {folder} began with", got=f"another {', '.join(differ)}",
                          do="go on with that configuration, or train into a new folder")  # fmt: skip
    return run.header, run.status == "finished"


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
