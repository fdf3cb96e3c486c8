"""What the ranks of test_distributed.py do."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from equipoise.errors import DataError
from equipoise.lab.config.schema import ParallelConfig, RunConfig
from equipoise.lab.models.pretrained import prepare_text
from equipoise.lab.models.transformer import LanguageModel
from equipoise.lab.training.distributed import ShardedModel, join, reported_by_rank_0
from equipoise.lab.training.evaluation import evaluate
from equipoise.lab.training.routing_churn import LastRouting
from equipoise.lab.training.trainer import train


def run(config: RunConfig, folder: Path, layout: ParallelConfig, resume: bool = False) -> list[float]:
    """Trains; returns the losses that this rank saw."""
    losses: list[float] = []
    with join(layout) as context:
        train(config, folder, resume=resume, context=context, on_step=lambda step: losses.append(step.loss))
    return losses


def run_with_a_signal(config: RunConfig, folder: Path, layout: ParallelConfig, rank: int, at: int) -> str:
    """One rank alone is asked to stop."""

    def on_step(step: Any) -> None:
        if step.step == at and dist.get_rank() == rank:
            os.kill(os.getpid(), signal.SIGTERM)

    try:
        with join(layout) as context:
            train(config, folder, context=context, on_step=on_step)
    except KeyboardInterrupt:
        return "stopped"
    return "finished"


def evaluated_twice(config: RunConfig) -> list[float]:
    """The routing churn between two models that know nothing."""
    data, last = prepare_text(config.model, config.data), LastRouting()
    with join(ParallelConfig()) as context:
        for seed in (0, 1):
            model = LanguageModel(config.model, seed=seed)
            found = evaluate(model, data, step=seed, sequences=5, group=context.group, last=last)
    return found.routing_churn


def resume_and_warn(config: RunConfig, folder: Path, layout: ParallelConfig) -> list[str]:
    """What a rank was warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(config, folder, layout, resume=True)
    return [str(one.message) for one in caught if "checkpoint" in str(one.message)]


def refused(config: RunConfig, folder: Path, layout: ParallelConfig, resume: bool = False) -> tuple[str, str, bool]:
    """Name and text of the error, and whether this rank may be silent about it."""
    try:
        run(config, folder, layout, resume)
    except Exception as error:
        return type(error).__name__, str(error), reported_by_rank_0(error)
    return "", "", False


def gradients(config: RunConfig, layout: ParallelConfig, clip: float) -> dict[str, Any]:
    """Norm and whole gradients after a step's backward on this rank's share of the tokens."""
    tokens_BS = torch.randint(0, 300, (4, 17), generator=torch.Generator().manual_seed(0))
    with join(layout) as context:
        model = LanguageModel(config.model, seed=dist.get_rank())  # ranks that begin apart are brought together
        sharded = ShardedModel(context, model)
        for sequence in context.shard(list(tokens_BS)):
            loss = model(sequence[None, :-1], sequence[None, 1:])
            (loss * context.size / len(tokens_BS)).backward()
        norm = sharded.combine_gradients(clip)
        optimizers = [torch.optim.SGD(some, lr=1.0) for some in (sharded.expert_params, sharded.other_params)]
        before = sharded.state(optimizers[0])
        for optimizer in optimizers:
            optimizer.step()
        after = sharded.state(optimizers[0])
    if not before:
        return {"norm": norm}
    moved = {name: (before["model"][name] - after["model"][name]) for name in before["model"]}
    return {"norm": norm, "gradients": moved}


def one_rank_cannot(folder: Path) -> tuple[str, bool]:
    """A thing that every rank has to do fails on the last."""

    def prepare() -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            raise DataError(expected="text", got="none", do="copy it here")

    with join() as context:
        try:
            context.local_main_first(prepare)
        except DataError as error:
            return str(error), reported_by_rank_0(error)
    return "", False


def different(value_of_rank_0: str) -> str:
    with join() as context:
        try:
            context.check_same("one text", value_of_rank_0 if context.rank == 0 else "b")
        except ValueError as error:
            return str(error)
    return ""
