"""A PyTorch loop of your own, with layers of ours: two lines of balance in it, micro-batches of uneven length.

The model reads bytes of Python's own library. A global batch is 4 micro-batches, whose rows have different lengths, so
the loop says how many tokens the step has (begin_step); with rows of equal length that line is not needed.

    python examples/plain_loop.py
    python examples/plain_loop.py --coef 0      # what happens without
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise import AuxLoss, Balancer, MoE

LENGTH, ROWS, MICRO_BATCHES = 64, 8, 4


class Model(nn.Module):
    """The next byte from the four before it, through two MoE layers."""

    def __init__(self, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(257, dim)  # 256 is padding
        self.context = nn.Conv1d(dim, dim, kernel_size=4)
        self.layers = nn.ModuleList(MoE(dim, hidden=64, num_experts=16, top_k=2, batch_first=True) for _ in range(2))
        self.head = nn.Linear(dim, 257)

    def forward(self, ids_BS: Tensor) -> Tensor:
        before = F.pad(self.embedding(ids_BS).transpose(1, 2), (3, 0))
        h = self.context(before).transpose(1, 2)
        for layer in self.layers:
            h = h + layer(F.rms_norm(h, h.shape[-1:]), token_mask_BS=ids_BS != 256)  # padding is not counted
        return self.head(h)


def draw(text: Tensor) -> list[Tensor]:
    """The micro-batches of one step: rows of 32 to 64 bytes, padded with 256."""
    starts = torch.randint(len(text) - LENGTH, (MICRO_BATCHES, ROWS, 1))
    lengths = torch.randint(LENGTH // 2, LENGTH + 1, (MICRO_BATCHES, ROWS, 1))
    place = torch.arange(LENGTH)
    return list(torch.where(place < lengths, text[starts + place], 256))


def show(when: str, balancer: Balancer) -> None:
    maxvio = [float(counts_E.max() / counts_E.double().mean() - 1) for counts_E in balancer.load()]
    print(f"{when:>11}: MaxVio " + "  ".join(f"layer {i}: {value:.2f}" for i, value in enumerate(maxvio)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--coef", type=float, default=5e-2, help="of the loss; high for few steps: 1e-2 is usual")
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()

    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balancer = Balancer(model, [AuxLoss("global_batch", coef=arguments.coef)], optimizer)
    for step in range(arguments.steps):
        micro_batches = draw(text)
        tokens = sum(int((ids_BS != 256).sum()) for ids_BS in micro_batches)
        balancer.begin_step(tokens=tokens, micro_batches=len(micro_batches))
        total = 0.0
        for ids_BS in micro_batches:
            logits, targets = model(ids_BS)[:, :-1], ids_BS[:, 1:]
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=256)
            loss = balancer.tap(loss) / len(micro_batches)  # tap first, scale then
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, arguments.steps - 1):
            show(f"step {step + 1}", balancer)
            print(f"{'':>11}  loss {total:.2f}, balance {balancer.metrics()['balance/global/loss']:.3f} (1 = even)")


if __name__ == "__main__":
    main()
