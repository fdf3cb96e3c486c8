"""Trains a small dense model, makes experts of it in three ways, and shows what each cost and kept.

1. a dense Qwen3 is trained by a plain loop on the text of this installation (or --dense FOLDER: one that you have);
2. `equipoise upcycle` makes it a Qwen3-MoE: copies, split neurons, and a distillation of half the active width;
3. transformers loads each folder; held-out loss before and after stands side by side.

python examples/upcycle_dense.py                                        # some minutes on one core, no download
python examples/upcycle_dense.py --dense models/Qwen3-0.6B --data val.jsonl --out upcycled
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from equipoise.lab.data.packing import BatchSampler, prepare
from equipoise.lab.models.hf_files import write_tokenizer
from equipoise.lab.upcycling import Distillation, Request, Upcycled, render_result, shape_of, upcycle

LENGTH, SEQUENCES, VOCABULARY = 256, 32, 2048


def train_dense(folder: Path, data: Path | None, steps: int, lr: float = 3e-3) -> None:
    """A model of two layers from nothing to a folder that transformers loads, with the lab's tokenizer."""
    text = prepare(data, vocab_size=VOCABULARY, sequence_length=LENGTH)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=256, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    batches = BatchSampler(text, seed=0, sequences_per_micro_batch=SEQUENCES, micro_batches=1, mix="sequence")
    for step in range(steps):
        tokens_BS = batches.step(step)[0].tokens_BS
        logits_BSV = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % 20 == 0:
            print(f"dense model, step {step + 1}/{steps}: loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    write_tokenizer(text.tokenizer_path, folder, LENGTH)


def requests(dense: Path, data: Path | None, tokens: int, sequences: int) -> dict[str, Request]:
    """Eight experts, two for a token. Copies have twice the active width, a split the same, a distillation half."""

    def asked(method: str) -> Request:
        return Request(
            dense=dense, method=method, shape=shape_of(method), text=True, data=data, length=LENGTH,
            eval_sequences=sequences, distillation=Distillation("global", tokens, passes=4, lr=3e-3),
        )  # fmt: skip

    return {method: asked(method) for method in ("copy", "split", "distill")}


def side_by_side(found: dict[str, Upcycled]) -> str:
    rows = [f"{'':<10}{'held-out loss':>14}{'against dense':>15}{'active':>9}{'all':>8}"]
    for method, one in found.items():
        dense, loss = fmean(one.dense_loss.values()), fmean(one.loss.values())
        active, total = (n / one.dense_parameters for n in (one.active_parameters, one.parameters))
        rows.append(f"{method:<10}{loss:>14.4f}{loss - dense:>+15.4f}{active:>8.2f}x{total:>7.2f}x")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dense", type=Path, help="a dense model of transformers (default: one is trained)")
    parser.add_argument("--data", type=Path, help="text, as `equipoise compare --data` takes it")
    parser.add_argument("--steps", type=int, default=120, help="of the dense model's training (default 120)")
    parser.add_argument("--tokens", type=int, default=32_768, help="of the distillation (default 32768)")
    parser.add_argument("--eval-sequences", type=int, default=8, help="held-out sequences of each domain (default 8)")
    parser.add_argument("--out", type=Path, default=Path("upcycled"), help="folder for all models (default: upcycled)")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dense = arguments.dense or arguments.out / "dense"
    if arguments.dense is None and not (dense / "config.json").is_file():
        train_dense(dense, arguments.data, arguments.steps)
    found = {}
    for method, request in requests(dense, arguments.data, arguments.tokens, arguments.eval_sequences).items():
        found[method] = upcycle(request, arguments.out / method)
        print(f"\n{render_result(found[method])}", flush=True)
        model = AutoModelForCausalLM.from_pretrained(arguments.out / method)
        print(f"\n{arguments.out / method} loads as {type(model).__name__}")
    print(f"\n{side_by_side(found)}")
    print(f"\nnext: equipoise compare --model {arguments.out / 'copy'} --strategies micro,global")


if __name__ == "__main__":
    main()
