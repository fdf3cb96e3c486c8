"""A run of one forward a step, in one process: trained, evaluated, saved and resumed to the same bits.

`SmallRun` is what the rooms beside the language models have in common (images by diffusion, text and images fused); a
room's own class says what its data, model, loss and evaluation are.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ... import __version__
from ...balancer.balancer import Balancer
from ...errors import ConfigError, DataError, DivergedError, InputError, OutputError, StateError
from ...layers import TokenPools
from ...layers.expert_choice import ExpertChoiceRouter
from ...policies import Policy
from ...report.data.run_view import flatten
from ...storage import checkpoint
from ...storage.codec import encode
from ...storage.files import output_errors
from ...storage.run_record import RECORD_NAME, End, Evaluation, Header, RecordWriter, Step, begun, read_run
from ..config.loading import from_dict
from .process import is_due, keep_freed_memory, peak_memory, run_to_end, threads
from .trainer import learning_rate

__all__ = ["SmallRun", "train_small"]

STEP_SEEDS = 1_000_003  # apart: seed · this + step is the seed of what a step draws


class SmallRun(ABC):
    """What a run holds between two steps. ``config`` has tables ``model`` and ``train`` and a ``strategy``."""

    task: ClassVar[str]  # as `Header` has it
    told: ClassVar[str]  # what it trains on, in a word
    config_type: ClassVar[type]

    def __init__(self, config: Any, folder: Path, earlier: Header | None) -> None:
        self.config, self.folder = config, folder
        self.load()
        self.model = self.build()
        train = config.train
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=train.lr, weight_decay=train.weight_decay,
                                           betas=(0.9, 0.99), fused=True)  # fmt: skip
        chooses = any(isinstance(module, ExpertChoiceRouter) for module in self.model.modules())
        self.pools = TokenPools(self.model, self.optimizer) if chooses else None
        policies = self.policies()
        self.balancer = None if policies is None else self.balanced(policies)
        self.step, self.saved, self.seconds, self.tokens = 0, 0, 0.0, 0
        if earlier is not None:
            if earlier.corpus_sha256 != self.sha256:
                raise DataError(expected=f"the {self.told} that the run began with",
                                got=f"{self.told} with another checksum",
                                do="bring back the old files, or train into a new folder")  # fmt: skip
            if (found := checkpoint.load_latest(folder / checkpoint.FOLDER)) is not None:
                self._restore(*found)
        with output_errors(f"the folder {folder}", "choose another folder"):
            folder.mkdir(parents=True, exist_ok=True)
        self.writer = RecordWriter(folder, keep_until=self.step if self.step else -1)
        self.writer.write(self._header([repr(policy) for policy in policies or ()]))

    @abstractmethod
    def load(self) -> None:
        """Reads the data."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """Of the data."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The model."""

    @abstractmethod
    def policies(self) -> Sequence[Policy] | None:
        """Of a Balancer; None for a model that has none."""

    @abstractmethod
    def loss(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """The mean loss of a step's batch and its tokens; all that is random comes from the generator."""

    @abstractmethod
    def evaluation(self) -> Evaluation:
        """Of the held-out data."""

    @abstractmethod
    def described(self) -> dict[str, Any]:
        """The header's fields on the model: policies of none, num_layers, num_experts, top_k, domains, parameters."""

    def balanced(self, policies: Sequence[Policy]) -> Balancer:
        return Balancer(self.model, list(policies), optimizer=self.optimizer)

    def last(self) -> None:  # noqa: B027
        """What else is left behind when the last step is done."""

    def train_step(self) -> Step:
        train, began = self.config.train, time.perf_counter()
        rate = learning_rate(cast(Any, train), self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss, tokens = self.loss(torch.Generator().manual_seed(train.seed * STEP_SEEDS + self.step))
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
        seconds = time.perf_counter() - began
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        record = Step(self.step, loss.item(), rate, norm, tokens, seconds, metrics)
        self.writer.write(record)
        return record

    def after_step(self) -> None:
        """The evaluation that is due, and behind it the checkpoint."""
        train, last = self.config.train, self.step == self.config.train.steps
        if last or is_due(self.step, train.eval_every):
            self.writer.write(self.evaluation())
        if last or is_due(self.step, train.checkpoint_every):
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
        if done:
            self.last()
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
        return DivergedError(expected=f"a finite loss and gradient at step {self.step + 1}", got=got,
                        do=f"lower train.lr or raise train.warmup; the weights after step {self.saved} are in "
                           f"{self.folder / checkpoint.FOLDER}")  # fmt: skip

    def _header(self, policies: list[str]) -> Header:
        said: dict[str, Any] = self.described()
        said["policies"] = policies or said["policies"]
        return Header(
            strategy=self.config.strategy, seed=self.config.train.seed, config=encode(self.config),
            corpus_sha256=self.sha256,
            versions={"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                      "equipoise": __version__},
            started=datetime.now(UTC).isoformat(timespec="seconds"), resumed_at=self.step, task=self.task,
            **said,
        )  # fmt: skip

    def _end(self, status: str, message: str = "") -> End:
        return End(self.step, status, self.seconds, self.tokens, peak_memory(), message)


def train_small(
    run_type: type[SmallRun], config: Any, folder: Path, *, resume: bool, on_step: Callable[[Step], None] | None
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
        DataError: data or checkpoints that cannot be read, or other data than the run began with.
        InputError: a pool that is smaller than the experts that choose from it.
        StateError: the loss or a gradient became NaN or infinite.
    """
    earlier, finished = _earlier_run(run_type, config, folder, resume)
    if finished:
        return folder
    keep_freed_memory()
    with threads(config.train.threads):
        run = run_type(config, folder, earlier)
        run_to_end(run, config.train.steps, on_step)
    return folder


def _earlier_run(run_type: type[SmallRun], config: Any, folder: Path, resume: bool) -> tuple[Header | None, bool]:
    """Header of the run in ``folder``, checked against ``config``, and whether that run is finished."""
    if not (folder / RECORD_NAME).exists():
        return None, False
    if not resume:
        raise OutputError(expected=f"a folder without a run: {folder}", got=f"one that holds {RECORD_NAME}",
                          do="choose another folder, or go on with this run: --continue in a command")  # fmt: skip
    if not begun(folder):
        return None, False
    run = read_run(folder, run_type.task)
    before, wanted = (
        json.loads(json.dumps(flatten(encode(one))))
        for one in (from_dict(run_type.config_type, run.header.config), config)
    )
    if differ := sorted(name for name in wanted if before.get(name) != wanted[name]):
        raise ConfigError(expected=f"the configuration that {folder} began with", got=f"another {', '.join(differ)}",
                          do="go on with that configuration, or train into a new folder")  # fmt: skip
    return run.header, run.status == "finished"
