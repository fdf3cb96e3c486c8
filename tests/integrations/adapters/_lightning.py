"""A real Lightning Trainer on two tiny models, in one process or as a rank of several, for test_lightning.py."""

from __future__ import annotations

import contextlib
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from _named import named
from contracts.law._model import policy
from equipoise import Balancer, MoE
from integrations.hf._trainer import VOCABULARY, Text
from integrations.hf._trainer import model as qwen

STEP = 8  # sequences of a global batch


class Ours(nn.Module):
    """An embedding and two MoE layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(MoE(8, 8, num_experts=4, top_k=2, batch_first=True) for _ in range(2))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor) -> Tensor:
        h = self.embedding(input_ids)
        for layer in self.layers:
            h = h + layer(h, token_mask_BS=attention_mask != 0)
        return h


def build(kind: str) -> nn.Module:
    return Ours() if kind == "ours" else qwen()


def loss_of(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A mean over as many numbers in every micro-batch, so that accumulation and ranks cannot change its gradient."""
    out = net(**batch)
    return (out if isinstance(out, Tensor) else out.logits).square().mean()


class Rows(IterableDataset):
    """The same text, of a length that nobody knows beforehand."""

    def __iter__(self) -> Any:
        return (Text()[i] for i in range(len(Text())))


class Again(Text):
    """The same global batch over and over: a run that resumes in the middle of an epoch begins its loader anew."""

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return super().__getitem__(i % STEP)


def plain_loop(kind: str, policies: list[dict], steps: int, *, clip: float = 0.0, dtype: Any = None) -> dict[str, Any]:
    """One process, one micro-batch a step, nothing of Lightning."""
    net = build(kind)
    balancer = Balancer(net, named(policy(p) for p in policies))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    gradients = []
    for step in range(steps):
        rows = [Text()[i] for i in range(STEP * step, STEP * (step + 1))]
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        with torch.autocast("cpu", dtype, cache_enabled=False) if dtype else contextlib.nullcontext():
            loss = loss_of(net, batch)
        balancer.tap(loss).backward()
        gradients.append({n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None})
        if clip:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return _result(net, balancer, gradients)


def fit(
    kind: str,
    policies: list[dict],
    *,
    batch: int,
    accumulate: int,
    steps: int,
    data: Dataset | None = None,
    manual: str = "",
    resume: str | None = None,
    options: dict[str, Any] | None = None,
    callbacks: tuple = (),
    package: str = "lightning.pytorch",
    **arguments: Any,
) -> dict[str, Any]:
    """Gradients that each optimizer step is given, loads, logged metrics and the end's weights."""
    import importlib

    pl = importlib.import_module(package)
    from equipoise.adapters.lightning import BalanceCallback

    balance = BalanceCallback(named(policy(p) for p in policies), **(options or {}))
    gradients: list[dict[str, Tensor]] = []
    logged: list[dict[str, float]] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = build(kind)
            self.automatic_optimization = not manual

        def training_step(self, rows: dict[str, Tensor], batch_idx: int) -> Any:
            loss = loss_of(self.net, rows)
            if not manual:
                return {"loss": loss} if kind == "ours" else loss
            if manual == "tapped":
                assert balance.balancer is not None
                loss = balance.balancer.tap(loss)
            self.manual_backward(loss / accumulate)
            if (batch_idx + 1) % accumulate == 0:
                optimizer: Any = self.optimizers()
                grab.on_before_optimizer_step(self.trainer, self, optimizer)
                optimizer.step()
                optimizer.zero_grad()
            return None

        def validation_step(self, rows: dict[str, Tensor], batch_idx: int) -> None:
            loss_of(self.net, rows)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    class Grab(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            named = pl_module.net.named_parameters()
            gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            logged.append({k: float(v) for k, v in trainer.callback_metrics.items()})

    grab, module = Grab(), Module()
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": steps, "accumulate_grad_batches": 1 if manual else accumulate,
        "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "log_every_n_steps": 1, "num_sanity_val_steps": 0, "devices": 1, "use_distributed_sampler": False,
    }  # fmt: skip
    # ours first: a checkpoint that is written at the same moment has to see what it keeps
    trainer = pl.Trainer(**(settings | arguments), callbacks=[balance, *callbacks, *([] if manual else [grab])])
    in_order: Any = DistributedSampler(Text(), shuffle=False) if dist.is_initialized() else None
    loader = DataLoader(data or Text(), batch_size=batch, sampler=in_order)
    validation = DataLoader(Text(), batch_size=16) if "val_check_interval" in arguments else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice about loaders, loggers and workers
        trainer.fit(module, loader, validation, ckpt_path=resume)
    assert balance.balancer is not None
    left = [name for name in ("training_step",) if name in vars(trainer.strategy)]
    return _result(module.net, balance.balancer, gradients) | {"logged": logged, "left": left}


def _result(net: nn.Module, balancer: Balancer, gradients: list[dict[str, Tensor]]) -> dict[str, Any]:
    return {
        "gradients": gradients,
        "loads": [counts_E.tolist() for counts_E in balancer.load()],
        "weights": {n: p.detach().clone() for n, p in net.named_parameters()},
        "steps": balancer.step_count,
    }


def fit_rank(kind: str, policies: list[dict], arguments: dict[str, Any]) -> dict[str, Any]:
    """The same as one rank of the process group that runs."""
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment

    rank, size = dist.get_rank(), dist.get_world_size()
    names = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the process group is there
    os.environ |= names
    try:
        return fit(kind, policies, **arguments, devices=size, strategy="ddp", plugins=[TorchElasticEnvironment()])
    finally:
        for name in names:
            os.environ.pop(name, None)
