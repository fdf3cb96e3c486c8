"""Accelerate's loop with a Mixture-of-Experts model of transformers, on one process or several: the same gradient.

`accelerator.backward` divides the loss by the accumulation steps and DDP averages over processes; the tap learns both
from the gradient that arrives. Rows are padded, so each step begins with its number of tokens over all processes.

    python examples/accelerate_loop.py
    accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
    python examples/accelerate_loop.py --coef 0     # what happens without
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from equipoise import AuxLoss, Balancer

LENGTH, ROWS, MICRO_BATCHES = 64, 16, 2  # rows of all processes together


def build() -> torch.nn.Module:
    sizes = {"vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": LENGTH}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    experts = {"moe_intermediate_size": 32, "num_experts": 16, "num_experts_per_tok": 2}
    return AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes, **heads, **experts, use_cache=False))


def draw(text: Tensor, process: int, processes: int) -> list[dict[str, Tensor]]:
    """This process's micro-batches of one step; every process draws all rows and takes its share."""
    starts = torch.randint(len(text) - LENGTH, (MICRO_BATCHES, ROWS, 1))
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (MICRO_BATCHES, ROWS, 1))
    place = torch.arange(LENGTH)
    ids, mask = text[starts + place][:, process::processes], (place < lengths)[:, process::processes]
    return [
        {"input_ids": i, "attention_mask": m.long(), "labels": i.masked_fill(~m, -100)}
        for i, m in zip(ids, mask, strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coef", type=float, default=5e-2, help="of the loss; high for few steps: 1e-2 is usual")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()

    accelerator = Accelerator(gradient_accumulation_steps=MICRO_BATCHES, cpu=True)
    model = build()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    balancer = Balancer(model, [AuxLoss("global_batch", coef=arguments.coef)])  # behind prepare: it knows all processes
    for step in range(arguments.steps):
        micro_batches = draw(text, accelerator.process_index, accelerator.num_processes)
        tokens = torch.tensor(sum(int(one["attention_mask"].sum()) for one in micro_batches))
        balancer.begin_step(tokens=int(accelerator.reduce(tokens, "sum")), micro_batches=len(micro_batches))
        for batch in micro_batches:
            with accelerator.accumulate(model):
                loss = balancer.tap(model(**batch).loss)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        if step in (0, arguments.steps - 1):
            maxvio = [float(counts_E.max() / counts_E.double().mean() - 1) for counts_E in balancer.load()]
            layers = "  ".join(f"layer {i}: {value:.2f}" for i, value in enumerate(maxvio))
            accelerator.print(f"step {step + 1}: MaxVio {layers}  loss of process 0: {loss.item():.2f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
