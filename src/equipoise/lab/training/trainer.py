"""The trainer: one run from a configuration to a folder with its record, its checkpoints and its TensorBoard events.

    runs/my-run/record.jsonl           every number, see `equipoise.storage.run_record`
    runs/my-run/checkpoints/step_*/    the newest, see `equipoise.storage.checkpoint`
    runs/my-run/tensorboard/           events, see `equipoise.lab.training.trackers`

On a CPU a run is a function of its configuration: killed at any moment and resumed, it gives the same numbers. Several
processes that share a run (`equipoise.lab.training.distributed`) make the same steps; the first of them writes.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ... import __version__
from ...balancer.balancer import Balancer
from ...errors import ConfigError, DataError, DivergedError, InputError, OutputError, StateError
from ...policies import AuxLoss, Policy
from ...policies.schedule import Schedule
from ...storage import checkpoint
from ...storage.codec import encode
from ...storage.files import atomic_write
from ...storage.run_record import RECORD_NAME, End, Fidelity, Header, Load, Record, RecordWriter, Step, begun, read_run
from ..config.schema import RunConfig, TrainConfig, from_dict
from ..config.strategies import strategy_of
from ..config.widths import expert_widths
from ..data.packing import BatchSampler
from ..models.pretrained import build, fingerprint, prepare_text
from ..models.protocol import active_parameters
from ..models.text_masks import mask_by_text
from .distributed import RankContext, ShardedModel, join
from .evaluation import evaluate
from .micro_batching import max_pass_size, num_passes, uses_shuffle
from .process import is_due, keep_freed_memory, peak_memory, run_to_end, threads
from .routing_churn import LastRouting
from .trackers import Trackers, require

__all__ = ["CHECKPOINTS", "learning_rate", "train"]

CHECKPOINTS = checkpoint.FOLDER
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def train(
    config: RunConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    context: RankContext | None = None,
) -> Path:
    """Trains one run into ``folder`` and returns the folder.

    Args:
        resume: continue from the newest intact checkpoint, or from the start if there is none, instead of refusing a
            folder that holds a run. The configuration must be the one it began with. A finished run is left as it is.
        on_step: called with each step's record after it was written, on every rank.
        context: the processes that share the run; default: those that torchrun started, or this one alone (`join`).

    Ctrl-C and SIGTERM end the step at hand, save and raise KeyboardInterrupt; a second Ctrl-C stops at once.

    Raises:
        OutputError: a folder that holds a run, cannot be written, or a full disk; the last whole checkpoint stays.
        ConfigError: another configuration than the run began with, or one that cannot work on these ranks.
        DataError: text or checkpoints that cannot be read.
        StateError: the loss or a gradient became NaN or infinite; the weights before that step are saved. Or a rank is
            gone.
    """
    if context is None:
        with join() as context:
            return train(config, folder, resume=resume, on_step=on_step, context=context)
    folder = Path(folder)
    context.check(config)
    earlier, finished = context.from_rank_0(lambda: _earlier_run(config, folder, resume))
    if finished:
        return folder
    keep_freed_memory()
    with threads(config.train.threads), context.detect_lost_ranks():
        run = _Run(config, folder, context)
        run.start(earlier)
        run_to_end(run, config.train.steps, on_step, context.any)
    return folder


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of a step (1 = first): up a line over the warm-up, then down a cosine to ``min_lr_ratio`` at the last step.

    >>> config = TrainConfig(lr=1.0, min_lr_ratio=0.1, warmup=10, steps=110)
    >>> [round(learning_rate(config, step), 2) for step in (1, 10, 60, 110)]
    [0.1, 1.0, 0.55, 0.1]
    """
    if step <= config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * (1 + math.cos(math.pi * done)) / 2)


class _Run:
    """What a run holds between two steps: start, then train_step and after_step in turn, then finish or fail, close."""

    writer: RecordWriter | None = None  # on the main rank
    trackers: Trackers | None = None

    def __init__(self, config: RunConfig, folder: Path, context: RankContext) -> None:
        self.config, self.folder, self.context = config, folder, context
        train, self.strategy = config.train, strategy_of(config)
        self.data = context.local_main_first(lambda: prepare_text(config.model, config.data))
        context.check_same("the same text on every machine", self.data.corpus_sha256)
        self.batches = BatchSampler(
            self.data, seed=train.seed, sequences_per_micro_batch=train.sequences_per_micro_batch,
            micro_batches=train.micro_batches, mix=config.data.mix)  # fmt: skip
        torch.manual_seed(train.seed)
        self.fingerprint = fingerprint(config.model)
        self.model = build(config, compute_dtype=DTYPES[train.precision])
        mask_by_text(self.model, self.strategy.apply(config.model), self.data, train.seed)
        self.sizes = sum(p.numel() for p in self.model.parameters()), active_parameters(self.model)
        self.sharded = ShardedModel(context, self.model)
        self.optimizer = _optimizer(self.model, train, self.sharded.separate_params)
        # A run without policies is measured too: a loss with coefficient 0 adds no gradient.
        self.policies: list[Policy] = self.strategy.build(train.steps) or [AuxLoss("global_batch", coef=0.0)]
        self.balancer = Balancer(self.model.routed, self.policies, optimizer=self.optimizer,
                                 sequences_per_micro_batch=train.sequences_per_micro_batch,
                                 measure_estimators=train.fidelity_every > 0)  # fmt: skip
        self.random_state = torch.get_rng_state()
        self.step, self.saved = 0, 0  # the last step done, the last step saved
        self.seconds, self.tokens = 0.0, 0
        self.last_routing = LastRouting()

    def start(self, earlier: Header | None) -> None:
        """Opens the record, and loads the newest checkpoint of the run that ``earlier`` began, if there is one."""
        if earlier is not None:
            if earlier.corpus_sha256 != self.data.corpus_sha256:
                raise self.context.mark_shared(
                    DataError(expected="the text that the run began with", got="text with another checksum",
                              do="bring back the old files, or train into a new folder"))  # fmt: skip
            if earlier.versions.get("model", "") != self.fingerprint:
                raise self.context.mark_shared(
                    DataError(
                        expected=f"{self.config.model.folder} as it was when the run began",
                        got="other files",
                        do="bring back the old folder, or train into a new one",
                    )
                )
            found = self.context.broadcast_state(lambda: checkpoint.load_latest(self.folder / CHECKPOINTS))
            if found is not None:
                self._restore(*found)
        self.context.from_rank_0(self._open)

    def _open(self) -> None:
        """Opens the files of a run, on the main rank."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(expected=f"to make the folder {self.folder}", got=error.strerror or str(error),
                              do="choose another folder") from None  # fmt: skip
        if self.config.model.folder is None:  # an export needs it when the cache is gone
            atomic_write(self.folder / self.data.tokenizer_path.with_stem("tokenizer").name,
                         self.data.tokenizer_path.read_bytes(), do="free disk space")  # fmt: skip
        require(self.config.train.log)
        self.writer = RecordWriter(self.folder, keep_until=self.step if self.step else -1)
        self.writer.write(self._header())
        train = self.config.train
        if train.tensorboard or train.log:
            self.trackers = Trackers(self.folder, tensorboard=train.tensorboard, log=train.log,
                                 config=encode(self.config), step=self.step)  # fmt: skip

    def train_step(self) -> Step:
        """One optimizer step over all its micro-batches, and its record."""
        train, began = self.config.train, time.perf_counter()
        micro_batches = self.context.shard(self.batches.step(self.step))
        sequences = torch.cat([tokens_BS for tokens_BS, _ in micro_batches]).to(self.context.device)
        batches = sequences.chunk(num_passes(len(micro_batches), self._max_pass_size()))
        rate = learning_rate(train, self.step + 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        try:
            loss = self._backward(batches)
        except InputError as error:  # routers refuse NaN
            raise self._not_finite(error.got, together=False) from None
        loss, norm = self.context.mean(loss), self.sharded.combine_gradients(train.clip)
        if not math.isfinite(loss + norm):
            raise self._not_finite(f"loss {loss}, gradient norm {norm}")
        self.optimizer.step()
        self.optimizer.zero_grad()

        self.step += 1
        self.random_state = torch.get_rng_state()
        tokens, seconds = self.batches.tokens_per_step, time.perf_counter() - began
        self.tokens, self.seconds = self.tokens + tokens, self.seconds + seconds
        record = Step(self.step, loss, rate, norm, tokens, seconds, self.balancer.metrics())
        self._write(record)
        if self.trackers:
            self.trackers.step(record)
        return record

    def after_step(self) -> None:
        """Writes what is due: loads, fidelity, evaluation; the checkpoint last, after its records."""
        train = self.config.train
        if is_due(self.step, train.load_every):
            self._write(Load(self.step, [counts_E.tolist() for counts_E in self.balancer.load()]))
        if is_due(self.step, train.fidelity_every) and (found := self.balancer.estimator_error()):
            self._write(Fidelity(self.step, found["relative_error"], found["cosine"], self._estimators()))
        if is_due(self.step, train.eval_every) or self.step == train.steps:
            self.evaluate()
        if is_due(self.step, train.checkpoint_every) or self.step == train.steps:
            self.save()

    def evaluate(self) -> None:
        train = self.config.train
        record = evaluate(self.model, self.data, step=self.step, sequences=train.eval_sequences,
                          sequences_per_micro_batch=train.sequences_per_micro_batch, mix=self.config.data.mix,
                          seed=train.seed, group=self.context.group, last=self.last_routing)  # fmt: skip
        self._write(record)
        if self.trackers:
            self.trackers.evaluation(record)

    def save(self) -> None:
        """Saves a checkpoint of the last whole step; it does not depend on the layout."""
        state = self.sharded.state(self.optimizer) | {
            "balancer": self.balancer.state_dict(),
            "random_state": self.random_state,
            "last_routing": self.last_routing.ids_NLSK,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }
        keep = self.config.train.keep_checkpoints
        self.context.from_rank_0(lambda: checkpoint.save(self.folder / CHECKPOINTS, self.step, state, keep=keep))
        self.saved = self.step

    def finish(self) -> None:
        """Ends a run after its last step, or between two steps when a stop was requested."""
        done = self.step == self.config.train.steps
        if self.saved < self.step:
            self.save()
        self._write(self._end("finished" if done else "interrupted"))

    def fail(self, error: BaseException) -> None:
        """Writes into the record why the run ended, unless the disk is full."""
        stopped = isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(OutputError):
            self._write(self._end("interrupted" if stopped else "failed", str(error) or type(error).__name__))

    def close(self) -> None:
        self.balancer.remove()
        if self.writer:
            self.writer.close()
        if self.trackers:
            self.trackers.close()

    def _restore(self, step: int, state: dict[str, Any]) -> None:
        self.sharded.load(state, self.optimizer)
        self.balancer.load_state_dict(state["balancer"])
        self.random_state = state["random_state"]
        torch.set_rng_state(self.random_state)
        self.step = self.saved = step
        self.last_routing.ids_NLSK = state.get("last_routing")  # an older one has none
        self.seconds, self.tokens = state["seconds"], state["tokens"]

    def _max_pass_size(self) -> int:
        compares = is_due(self.step + 1, self.config.train.fidelity_every)
        return max_pass_size(self.config, self.policies, compares=compares)

    def _backward(self, batches: Sequence[Tensor]) -> float:
        """Gradients of all micro-batches; returns their mean loss."""
        self.model.train()
        if self.balancer.needs_counting and (len(batches) > 1 or uses_shuffle(self.policies)):
            with self.balancer.counting():
                for tokens_BS in batches:
                    self.model.hidden(tokens_BS[:, :-1])
        total = 0.0
        for tokens_BS in batches:
            loss = self.model(tokens_BS[:, :-1], tokens_BS[:, 1:])
            (self.balancer.tap(loss) / len(batches)).backward()  # the tap learns 1/M from its gradient
            total += loss.item()
        return total / len(batches)

    def _write(self, record: Record) -> None:
        if self.writer:
            self.writer.write(record)

    def _not_finite(self, got: str, *, together: bool = True) -> StateError:
        """Saves the weights that the failed step started from; the error names their folder.

        ``together``: all ranks know; a rank whose router alone saw a NaN cannot save, because the others train on.
        """
        self.balancer.discard()
        self.optimizer.zero_grad()
        together = together or self.context.size == 1
        if self.saved < self.step and together:
            self.save()
        error = DivergedError(expected=f"a finite loss and gradient at step {self.step + 1}", got=got,
                         do=f"lower train.lr or raise train.warmup; the weights after step {self.saved} are in "
                            f"{self.folder / CHECKPOINTS}")  # fmt: skip
        return self.context.mark_shared(error) if together else error

    def _header(self) -> Header:
        model, data, train = self.model.config, self.data, self.config.train
        versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
                    "equipoise": __version__}  # fmt: skip
        if self.fingerprint:
            versions["model"] = self.fingerprint
        if self.context.size > 1:
            versions["layout"] = str(self.context)
        return Header(
            strategy=self.strategy.name, policies=[repr(policy) for policy in self.policies], seed=train.seed,
            config=encode(self.config), num_layers=model.layers, num_experts=model.experts, top_k=model.top_k,
            domains=list(data.domains), corpus_sha256=data.corpus_sha256, versions=versions,
            parameters=self.sizes[0], active_parameters=self.sizes[1],
            started=datetime.now(UTC).isoformat(timespec="seconds"), resumed_at=self.step,
            expert_widths=list(expert_widths(model.expert_widths, model.experts, model.expert_hidden) or ()),
        )  # fmt: skip

    def _end(self, status: str, message: str = "") -> End:
        return End(self.step, status, self.seconds, self.tokens, peak_memory(), message)

    def _estimators(self) -> list[str]:
        """The estimators that this run trains with: those of its losses over the global batch."""
        losses = [loss for _, loss in Schedule(self.policies).losses]
        return sorted({loss.estimator for loss in losses if loss.scope == "global_batch" and loss.coef != 0})


def _earlier_run(config: RunConfig, folder: Path, resume: bool) -> tuple[Header | None, bool]:
    """Header of the run in ``folder``, checked against ``config``, and whether that run is finished."""
    if not (folder / RECORD_NAME).exists():
        return None, False
    if not resume:
        raise OutputError(expected=f"a folder without a run: {folder}", got=f"one that holds {RECORD_NAME}",
                          do="choose another folder, or resume this run")  # fmt: skip
    if not begun(folder):
        return None, False
    run = read_run(folder)
    header = run.header
    wanted = json.loads(json.dumps(encode(config)))
    before = json.loads(json.dumps(encode(from_dict(RunConfig, header.config))))  # settings that came later
    if before != wanted:
        raise ConfigError(expected=f"the configuration that {folder} began with",
                          got="another " + ", ".join(_differences(before, wanted)),
                          do="resume with the stored configuration, or train into a new folder")  # fmt: skip
    return header, run.status == "finished"


def _differences(old: Any, new: Any, path: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [d for key in keys for d in _differences(old.get(key), new.get(key), f"{path}.{key}" if path else key)]
    return [] if old == new else [path]


def _optimizer(model: nn.Module, train: TrainConfig, apart: Sequence[Tensor] = ()) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only. Parameters in ``apart`` get param groups of their own."""
    own = {id(p) for p in apart}
    groups = []
    for separate in (False, True):
        some = [p for p in model.parameters() if (id(p) in own) is separate and p.requires_grad]
        matrices, vectors = [p for p in some if p.ndim >= 2], [p for p in some if p.ndim < 2]
        groups.append({"params": matrices, "weight_decay": train.weight_decay})
        groups.append({"params": vectors, "weight_decay": 0.0})
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=train.lr, betas=train.betas,
                             eps=train.eps, fused=True)  # fmt: skip
