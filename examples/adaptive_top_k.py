"""A model of transformers that generates with fewer experts where its tokens can spare them.

Trains a small Qwen3-MoE on bytes of Python's own library, measures how sensitive its loss is to the second expert of
each layer, draws the curve of fewer experts against held-out loss, and generates with the thresholds of its knee. For a
model and text of your own `equipoise adapt MODEL --data DATA` measures it.

    python examples/adaptive_top_k.py
    python examples/adaptive_top_k.py --steps 400
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from pathlib import Path

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from equipoise import apply_adaptive_top_k
from equipoise.adaptive import AdaptableModel, knee, measure_sensitivity, sweep, thresholds_of
from equipoise.storage.adaptive_top_k_file import SavedThreshold, SavedTopK, write_top_k

LENGTH, ROWS = 128, 16


def draw(text: Tensor, rows: int) -> Tensor:
    return torch.stack([text[start : start + LENGTH + 1] for start in torch.randint(len(text) - LENGTH - 1, (rows,))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.manual_seed(0)
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))[:40]
    text = torch.tensor(list(b"\n".join(path.read_bytes() for path in files)))
    learned, held = text[: -len(text) // 5], text[-len(text) // 5 :]

    config = Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=2, head_dim=32,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(arguments.steps):
        ids = draw(learned, ROWS)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.2f}")

    model.eval()
    measured = AdaptableModel.of(model, lambda ids: model(input_ids=ids, use_cache=False).logits)
    profile = measure_sensitivity(measured, [draw(learned, ROWS) for _ in range(4)])
    for name, value in profile.sensitivity.items():
        print(f"{name}: {value:.3f} nats per squared weight")
    curve = sweep(measured, profile, [draw(held, ROWS) for _ in range(4)])
    for point in curve:
        print(
            f"{point.held.fewer(measured):6.1%} fewer experts: held-out loss {point.held.loss:.4f}, "
            f"with one threshold for all layers {point.control.loss:.4f}"
        )
    at = curve[knee([point.held.fewer(measured) for point in curve], [point.held.loss for point in curve])]
    print(f"knee: {at.held.fewer(measured):.1%} fewer experts")

    thresholds = thresholds_of(profile, at.budget)
    saved = SavedTopK(
        budget=at.budget,
        routers={name: SavedThreshold(experts=8, top_k=2, threshold=one) for name, one in thresholds.items()},
    )
    with tempfile.TemporaryDirectory() as folder:
        write_top_k(folder, saved)  # beside the weights, where model.save_pretrained(folder) writes them
        left_out = apply_adaptive_top_k(model, folder)
    print(f"dropped experts are not computed in {sum(left_out.values())} of {len(left_out)} layers")
    tokens = model.generate(torch.tensor([list(b"def ")]), max_new_tokens=80, do_sample=False)
    print(bytes(tokens[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
