"""Hugging Face's Trainer: import the callback and pass it, two lines, and the model is balanced over the global batch.

The Trainer goes on as it was: its accumulation, processes, precision and checkpoints change nothing in the balance
gradient. The model's own loss (output_router_logits) is switched off, and what we measure is in the Trainer's logs.

    python examples/hf_trainer.py
    torchrun --nproc-per-node 2 examples/hf_trainer.py
    python examples/hf_trainer.py --coef 0      # what happens without
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen3MoeConfig, Trainer, TrainingArguments, set_seed

from equipoise import AuxLoss
from equipoise.adapters.hf import BalanceCallback  # the first line

LENGTH = 64


class Text(Dataset):
    """Rows of Python's own library as bytes."""

    def __init__(self, rows: int) -> None:
        data = Path(argparse.__file__).read_bytes()[: rows * LENGTH]
        self.rows = torch.frombuffer(bytearray(data), dtype=torch.uint8).long().view(-1, LENGTH)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[i], "labels": self.rows[i]}


def build() -> torch.nn.Module:
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, **experts, use_cache=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coef", type=float, default=0.2, help="of the loss; high for few steps: 1e-2 is usual")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=arguments.steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            ddp_find_unused_parameters=False,
            disable_tqdm=True,
            log_level="error",
            dataloader_pin_memory=False,
        )
        balance = BalanceCallback([AuxLoss("global_batch", coef=arguments.coef)], layers=True)
        trainer = Trainer(build(), settings, train_dataset=Text(1024))
        balance.attach(trainer)  # the second
        trainer.remove_callback(PrinterCallback)  # it prints all that is logged, at every step
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "balance/tokens" in entry and "loss" in entry]
    layers = sum(name.endswith("/maxvio_global") for name in logs[0]) - 1  # and the mean over layers
    for entry in (logs[0], logs[-1]) if trainer.is_world_process_zero() else ():
        maxvio = [entry[f"balance/layer_{i:02d}/maxvio_global"] for i in range(layers)]
        shown = "  ".join(f"layer {i}: {value:.2f}" for i, value in enumerate(maxvio))
        print(f"step {entry['step']}: MaxVio {shown}  loss {entry['loss']:.2f}")


if __name__ == "__main__":
    main()
