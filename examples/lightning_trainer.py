"""Lightning's Trainer: import the callback and pass it, two lines, and the model is balanced over the global batch.

Lightning divides the loss by accumulate_grad_batches and DDP averages over processes; the balance gradient is the same
for every number of either. Metrics are logged as balance/..., so that other callbacks can monitor them.

    python examples/lightning_trainer.py
    python examples/lightning_trainer.py --coef 0   # what happens without
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from equipoise import AuxLoss, MoE
from equipoise.adapters.lightning import BalanceCallback  # the first line

LENGTH = 64


class Model(pl.LightningModule):
    """The next byte from the four before it, through two MoE layers; nothing in here knows of balance."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.context = nn.Conv1d(dim, dim, kernel_size=4)
        self.layers = nn.ModuleList(MoE(dim, hidden=64, num_experts=16, top_k=2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(dim, 256)

    def forward(self, ids_BS: Tensor) -> Tensor:
        before = F.pad(self.embedding(ids_BS).transpose(1, 2), (3, 0))
        h = self.context(before).transpose(1, 2)
        for layer in self.layers:
            h = h + layer(F.rms_norm(h, h.shape[-1:]))
        return self.head(h)

    def training_step(self, batch: list[Tensor]) -> Tensor:
        logits, targets = self(batch[0])[:, :-1], batch[0][:, 1:]
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


class Show(pl.Callback):
    """Reads what is logged, as any other callback could."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        seen = {name: float(value) for name, value in trainer.callback_metrics.items()}
        shown = [f"layer {i}: {seen.get(f'balance/layer_{i:02d}/maxvio_global', 0):.2f}" for i in range(2)]
        ends = (trainer.fit_loop.total_batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if ends and trainer.global_step in (1, trainer.max_steps):
            print(f"step {trainer.global_step}: MaxVio {'  '.join(shown)}  loss {seen['loss']:.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coef", type=float, default=0.2, help="of the loss; high for few steps: 1e-2 is usual")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # Lightning's advice about workers and loggers
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    data = Path(argparse.__file__).read_bytes()[: 1024 * LENGTH]
    rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(-1, LENGTH)
    trainer = pl.Trainer(
        callbacks=[BalanceCallback([AuxLoss("global_batch", coef=arguments.coef)]), Show()],  # the second
        max_steps=arguments.steps,
        accumulate_grad_batches=4,
        accelerator="cpu",
        log_every_n_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Model(), DataLoader(TensorDataset(rows), batch_size=8, shuffle=True))


if __name__ == "__main__":
    main()
