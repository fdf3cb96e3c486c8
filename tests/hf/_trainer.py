"""A real Trainer on a tiny Qwen3-MoE, in one process or as one rank of several: what test_trainer.py runs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler

from core._model import policy

VOCABULARY, LENGTH, SAMPLES = 64, 10, 32


def model(**config: Any) -> Any:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    experts = {"moe_intermediate_size": 8, "num_experts": 4, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, **experts, **config))


class Text(Dataset):
    """Rows of uneven length, padded; of some the labels begin late, as behind a prompt."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(i)
        ids = torch.randint(1, VOCABULARY, (LENGTH,), generator=generator)
        mask = (torch.arange(LENGTH) < 3 + i % 7).long()
        labels = ids.masked_fill((mask == 0) | (torch.arange(LENGTH) < i % 3), -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def train(
    policies: list[dict], batch: int, accumulate: int, steps: int, folder: str | None = None, **arguments: Any
) -> dict[str, Any]:
    """Gradients that each optimizer step is given, loads, logs and the end's weights."""
    from transformers import Trainer, TrainerCallback, TrainingArguments
    from transformers.utils import logging

    from equipoise.adapters.hf import BalanceCallback

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    gradients: list[dict[str, Tensor]] = []

    class Grab(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            named = kwargs["model"].named_parameters()
            gradients.append({n: p.grad.clone() for n, p in named if p.grad is not None})

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

    settings: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate, "max_steps": steps,
        "max_grad_norm": 0, "learning_rate": 1e-3, "lr_scheduler_type": "constant", "logging_steps": 1,
        "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip
    resume = arguments.pop("resume", None)
    built = model(**arguments.pop("config", {}))
    with tempfile.TemporaryDirectory() as scratch:
        args = TrainingArguments(folder or scratch, **(settings | arguments))
        callback = BalanceCallback([policy(p) for p in policies])
        trainer = InOrder(built, args, train_dataset=Text(), eval_dataset=Text(), callbacks=[callback, Grab()])
        trainer.train(resume_from_checkpoint=resume)
    balancer = callback.balancer
    assert balancer is not None
    return {
        "gradients": gradients,
        "loads": [counts_E.tolist() for counts_E in balancer.load()],
        "logs": trainer.state.log_history,
        "weights": {n: p.detach().clone() for n, p in built.named_parameters()},
        "coefficient": built.router_aux_loss_coef,
        "own": [name for name in ("compute_loss", "log", "get_batch_samples") if name in vars(trainer)],
    }


def train_rank(policies: list[dict], batch: int, accumulate: int, steps: int, arguments: dict) -> dict[str, Any]:
    """The same as one rank of the process group that runs."""
    from accelerate.state import AcceleratorState, PartialState

    rank = str(dist.get_rank())
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(dist.get_world_size()), "ACCELERATE_USE_CPU": "true"}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # asked for, not used: the process group is there
    os.environ |= names
    try:
        return train(policies, batch, accumulate, steps, **arguments)
    finally:
        AcceleratorState._reset_state(True)
        PartialState._reset_state()
        for name in names:
            os.environ.pop(name, None)


def checkpoint(folder: Path, step: int) -> str:
    return str(folder / f"checkpoint-{step}")


STEP_POLICIES: list[dict] = [{"scope": "sequence", "coef": 0.3}, {"scope": "global_batch", "coef": 0.3}]


def ddp_step(sequences: int, tokens: int) -> dict[str, Tensor]:
    """One rank's half of a step of a model inside DDP; its gradients."""
    from torch.nn.parallel import DistributedDataParallel

    from equipoise import AuxLoss, Balancer

    torch.set_num_threads(1)
    net: Any = DistributedDataParallel(model())
    balancer = Balancer(net, [AuxLoss(**p) for p in STEP_POLICIES])
    balancer.begin_step(tokens=tokens, micro_batches=1)
    half = sequences // dist.get_world_size()
    rows = [Text()[i] for i in range(half * dist.get_rank(), half * (dist.get_rank() + 1))]
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    net.train()
    balancer.tap(net(**batch).logits.square().mean()).backward()
    return {n.removeprefix("module."): p.grad.clone() for n, p in net.named_parameters()}
