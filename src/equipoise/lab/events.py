"""TensorBoard events of a run: a copy for the eye of what the record holds, which never stops a run."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..records import Evaluation, Step

__all__ = ["Events"]


class Events:
    """Writes event files into ``folder``. Without the package, or on a disk that fails, it says so once and goes on.

    ``purge_step``: TensorBoard hides what an earlier part of the run wrote from this step on.
    """

    def __init__(self, folder: Path, *, purge_step: int | None = None) -> None:
        self._writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            warnings.warn("no TensorBoard events: the package tensorboard is missing (pip install 'equipoise[lab]')",
                          stacklevel=2)  # fmt: skip
            return
        try:
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)
        except OSError as error:
            self._give_up(error)

    def step(self, record: Step) -> None:
        speed = record.tokens / max(record.seconds, 1e-9)
        self._add(record.step, {"train/loss": record.loss, "train/lr": record.lr, "train/grad_norm": record.grad_norm,
                                "train/tokens_per_second": speed} | record.balance)  # fmt: skip

    def evaluation(self, record: Evaluation) -> None:
        values = {"heldout/perplexity": record.perplexity, "heldout/loss": record.mean_loss}
        values |= {f"heldout/loss/{name}": loss for name, loss in record.loss.items()}
        values |= {f"heldout/bits_per_byte/{name}": bits for name, bits in record.bits_per_byte.items()}
        for layer, (maxvio, nats) in enumerate(zip(record.maxvio_global, record.mutual_information, strict=True)):
            values[f"heldout/layer_{layer:02d}/maxvio_global"] = maxvio
            values[f"heldout/layer_{layer:02d}/mutual_information"] = nats
        self._add(record.step, values)

    def close(self) -> None:
        if self._writer is not None:
            try:
                self._writer.close()
            except Exception as error:  # whatever the writer's own thread met
                self._give_up(error)

    def _add(self, step: int, values: dict[str, float]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
        except Exception as error:  # full disk, dead writer thread
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._writer = None
        warnings.warn(f"no more TensorBoard events: {error}", stacklevel=3)
