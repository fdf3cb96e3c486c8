"""Experiment trackers: TensorBoard, Weights & Biases and MLflow get the numbers of a run's record. None stops a run.

The names are those of the record: ``balance/maxvio_global``, ``balance/layer_03/maxvio_global``, ... as
``Balancer.metrics()`` returns them, then ``train/...`` and ``heldout/...``.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import time
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from ...errors import ConfigError
from ...storage.run_record import Evaluation, Step

__all__ = ["TENSORBOARD", "TRACKERS", "TRACKING_NAME", "Trackers", "evaluation_values", "require", "step_values"]

TENSORBOARD, TRACKING_NAME = "tensorboard", "tracking.json"
TITLES = {"tensorboard": "TensorBoard", "wandb": "Weights & Biases", "mlflow": "MLflow"}
PROJECT = "equipoise"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME is set


def step_values(record: Step) -> dict[str, float]:
    """The values of a step, by name.

    >>> sorted(step_values(Step(1, 2.5, 1e-3, 1.0, 512, 2.0, {"balance/layer_03/maxvio_global": 0.25})))
    ['balance/layer_03/maxvio_global', 'train/grad_norm', 'train/loss', 'train/lr', 'train/tokens_per_second']
    """
    speed = record.tokens / max(record.seconds, 1e-9)
    return {"train/loss": record.loss, "train/lr": record.lr, "train/grad_norm": record.grad_norm,
            "train/tokens_per_second": speed} | record.balance  # fmt: skip


def evaluation_values(record: Evaluation) -> dict[str, float]:
    """The values of an evaluation, by name."""
    values = {"heldout/perplexity": record.perplexity, "heldout/loss": record.mean_loss}
    values |= {f"heldout/loss/{name}": loss for name, loss in record.loss.items()}
    values |= {f"heldout/bits_per_byte/{name}": bits for name, bits in record.bits_per_byte.items()}
    for layer, (maxvio, nats) in enumerate(zip(record.maxvio_global, record.mutual_information, strict=True)):
        values[f"heldout/layer_{layer:02d}/maxvio_global"] = maxvio
        values[f"heldout/layer_{layer:02d}/mutual_information"] = nats
    values |= {f"heldout/layer_{layer:02d}/routing_churn": share for layer, share in enumerate(record.routing_churn)}
    return values


class Tracker(Protocol):
    """One place that values are sent to."""

    def add(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Trackers:
    """Sends every record to each tracker. One that fails (a full disk, no network) warns once and is dropped.

    Args:
        folder: of the run; stores the run ids of the trackers, so that a resumed run continues there.
        tensorboard: event files in ``folder/tensorboard``, with a warning where the package is missing.
        log: of ``TRACKERS``; `require` has seen that they are installed.
        config: of the run, shown beside its curves. step: of the checkpoint that it resumes from.
    """

    def __init__(
        self, folder: Path, *, tensorboard: bool = True, log: Sequence[str] = (), config: dict[str, Any] | None = None,
        step: int = 0,
    ) -> None:  # fmt: skip
        self._trackers: dict[str, Tracker] = {}
        kept = _tracked(folder)
        for name in [*["tensorboard"] * tensorboard, *log]:
            try:
                if name == "tensorboard":
                    if (board := _tensorboard(folder / TENSORBOARD, step)) is not None:
                        self._trackers[name] = board
                else:
                    self._trackers[name] = TRACKERS[name](folder.name, folder, config or {}, kept)
            except Exception as error:  # any error of a third-party package
                self._give_up(name, error)
        if kept:
            try:
                (folder / TRACKING_NAME).write_text(json.dumps(kept) + "\n", encoding="utf-8")
            except OSError as error:
                warnings.warn(f"a resumed run would be a new one at {', '.join(kept)}: {error}", stacklevel=2)

    def step(self, record: Step) -> None:
        self._add(step_values(record), record.step)

    def evaluation(self, record: Evaluation) -> None:
        self._add(evaluation_values(record), record.step)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as error:  # any error of the writer's own thread
                self._give_up(name, error)

    def _add(self, values: dict[str, float], step: int) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.add(values, step)
            except Exception as error:  # full disk, dead writer thread, no network
                self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        self._trackers.pop(name, None)
        warnings.warn(f"no more {TITLES[name]} events: {error}", stacklevel=4)


def require(log: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that is not installed, before a run writes anything."""
    for name in log:
        try:
            importlib.import_module(name)
        except ImportError:
            raise ConfigError(expected=f"the package {name}, which train.log asks for", got="it is not installed",
                              do=f"pip install {name}, or leave it out of --log") from None  # fmt: skip


def _tensorboard(folder: Path, step: int) -> TensorBoard | None:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        warnings.warn("no TensorBoard events: the package tensorboard is missing (pip install 'equipoise[lab]')",
                      stacklevel=3)  # fmt: skip
        return None
    return TensorBoard(SummaryWriter, folder, step)


class TensorBoard:
    def __init__(self, writer: Any, folder: Path, step: int) -> None:
        # what an earlier part of the run wrote after its checkpoint is hidden
        self._writer = writer(str(folder), purge_step=step + 1 if step else None)

    def add(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of the project equipoise, or of WANDB_PROJECT. WANDB_MODE=offline keeps it on this machine."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], kept: dict[str, str]) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        kept.setdefault("wandb", uuid.uuid4().hex[:12])
        self._run = wandb.init(project=os.environ.get("WANDB_PROJECT", PROJECT), name=name, dir=str(folder),
                               id=kept["wandb"], resume="allow", config=config)  # fmt: skip

    def add(self, values: dict[str, float], step: int) -> None:
        # steps made again after a resume are the same numbers; that it passes over them is right
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


class MLflow:
    """A run of the experiment equipoise, or of MLFLOW_EXPERIMENT_NAME, at MLFLOW_TRACKING_URI."""

    def __init__(self, name: str, folder: Path, config: dict[str, Any], kept: dict[str, str]) -> None:  # noqa: ARG002
        import mlflow  # pyright: ignore[reportMissingImports]
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        self._client, self._metric = mlflow.MlflowClient(), Metric
        if "mlflow" not in kept:
            wanted = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
            found = self._client.get_experiment_by_name(wanted)
            experiment = found.experiment_id if found else self._client.create_experiment(wanted)
            kept["mlflow"] = self._client.create_run(experiment, run_name=name).info.run_id
            for key, value in _flat(config).items():
                self._client.log_param(kept["mlflow"], key, str(value)[:500])
        self._id = kept["mlflow"]

    def add(self, values: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_allowed(name), value, now, step) for name, value in values.items()
                   if math.isfinite(value)]  # fmt: skip
        for start in range(0, len(metrics), 1000):  # as many as it takes at once
            self._client.log_batch(self._id, metrics=metrics[start : start + 1000])

    def close(self) -> None:
        self._client.set_terminated(self._id)


TRACKERS = {"wandb": WeightsAndBiases, "mlflow": MLflow}


def _allowed(name: str) -> str:
    """MLflow takes letters, digits and _ - . / and spaces: what else a domain's name holds becomes _.

    >>> _allowed("heldout/loss/c++")
    'heldout/loss/c__'
    """
    return re.sub(r"[^\w\-./ ]", "_", name)


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _tracked(folder: Path) -> dict[str, str]:
    """The run ids of earlier parts, by tracker."""
    try:
        kept = json.loads((folder / TRACKING_NAME).read_text(encoding="utf-8"))
        return {name: kept[name] for name in TRACKERS if isinstance(kept.get(name), str)}
    except (OSError, ValueError, AttributeError):
        return {}
