"""Masks by token id in a PyTorch loop of your own, on a model of transformers: rare words see one expert (MaskMoE).

A tiny Qwen3-MoE reads the words of Python's own library three times from the same weights and batches: routed freely,
with every word masked (hash routing), and with the rare words masked. What is compared is the loss on text that was
held out, by how frequent the word is that is read. Then the masked model is saved, loaded, and writes a line.

    python examples/masked_words.py                  # a few minutes on one core, no download
    python examples/masked_words.py --rare 0.4 --steps 400
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from equipoise import AuxLoss, Balancer, load_masks, mask_routers, save_masks
from equipoise.functional import draw_visible, frequency_class, rare_ids

WORDS, LENGTH, ROWS, MICRO_BATCHES, LAYERS, EXPERTS = 3000, 64, 8, 2, 2, 8
SIZES: dict[str, Any] = {
    "vocab_size": WORDS, "hidden_size": 64, "moe_intermediate_size": 64, "num_hidden_layers": LAYERS, "head_dim": 32,
    "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": EXPERTS, "num_experts_per_tok": 2,
}  # fmt: skip


def read() -> tuple[list[str], Tensor, Tensor]:
    """(the words, ids of the text to train on, ids of the text that is held out); the last id is for other words."""
    files = sorted(Path(argparse.__file__).parent.glob("*.py"))
    texts = [re.findall(r"\w+|[^\w\s]|\n", file.read_text(encoding="utf-8", errors="ignore")) for file in files]
    words = [word for word, _ in Counter(word for text in texts for word in text).most_common(WORDS - 1)]
    number = {word: i for i, word in enumerate(words)}
    ids = [torch.tensor([number.get(word, WORDS - 1) for word in text], dtype=torch.long) for text in texts]
    return [*words, "?"], torch.cat([one for i, one in enumerate(ids) if i % 8]), torch.cat(ids[::8])


def train(model: Qwen3MoeForCausalLM, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balancer = Balancer(model, [AuxLoss("global_batch", coef=2e-2)], optimizer)  # after the masks
    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for _ in range(MICRO_BATCHES):
            ids = text[torch.randint(len(text) - LENGTH, (ROWS, 1), generator=draw) + torch.arange(LENGTH)]
            (balancer.tap(model(input_ids=ids, labels=ids).loss) / MICRO_BATCHES).backward()
        optimizer.step()
        optimizer.zero_grad()
    balancer.remove()  # the masks stay


@torch.no_grad()
def losses(model: Qwen3MoeForCausalLM, text: Tensor, classes: Tensor) -> str:
    """Held-out nats per word where a word of each third of the text is read."""
    model.eval()
    rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)[:200]
    found = [
        F.cross_entropy(model(input_ids=ids[:, :-1]).logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for ids in rows.split(20)
    ]
    loss, where = torch.cat(found), classes[rows[:, :-1]]
    means = [float(loss[where == i].mean()) for i in range(3)]
    return "held-out loss after frequent words {:.3f}, others {:.3f}, rare ones {:.3f}".format(*means)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rare", type=float, default=0.2, help="share of the text whose words see one expert")
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    words, text, held_out = read()
    counts = torch.bincount(text, minlength=WORDS)
    rare, classes = rare_ids(counts, arguments.rare), frequency_class(counts, 3)
    print(f"{int(rare.sum())} of {WORDS} words are rare: {arguments.rare:.0%} of {len(text)} in the text")
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))
    for name, masked in (("free", torch.zeros_like(rare)), ("every word masked", rare | True), ("rare masked", rare)):
        torch.manual_seed(0)
        model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES))
        mask_routers(model, [draw_visible(masked, EXPERTS, seed=layer) for layer in range(LAYERS)])
        train(model, text, arguments.steps)
        print(f"{name:>18}: {losses(model, held_out, classes)}")

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        save_masks(model, folder)  # beside the weights, which do not hold them
        again: Any = Qwen3MoeForCausalLM.from_pretrained(folder)
        mask_routers(again, load_masks(folder))
        ids = again.generate(held_out[:8].unsqueeze(0), max_new_tokens=12, do_sample=False, pad_token_id=0)
    print("written with a cache:", " ".join(words[i] for i in ids[0].tolist()).replace("\n", "\\n"))


if __name__ == "__main__":
    main()
