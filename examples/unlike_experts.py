"""Experts of unlike widths (HMoE, arXiv 2408.10681): who is used under the plain loss and under the parameter penalty.

The model reads bytes of Python's own library. It is trained twice from the same weights; each time it says how much of
its share the experts of each width get, and how many hidden units a token uses by that.

    python examples/unlike_experts.py
    python examples/unlike_experts.py --top-p 0.6     # as many experts as a token needs, with the entropy loss
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise import AuxLoss, Balancer, EntropyLoss, MoE
from equipoise.policies import Policy

WIDTHS = [36, 44, 52, 60, 68, 76, 84, 92]  # 9 : 11 : ... : 23, as 8 experts of 64 together
LENGTH, ROWS = 64, 32


class Model(nn.Module):
    """The next byte from the four before it, through two MoE layers."""

    def __init__(self, top_p: float | None, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.context = nn.Conv1d(dim, dim, kernel_size=4)
        top_k = 2 if top_p is None else len(WIDTHS)
        layer = {"hidden": WIDTHS, "num_experts": len(WIDTHS), "top_k": top_k, "top_p": top_p, "batch_first": True}
        self.layers = nn.ModuleList(MoE(dim, **layer) for _ in range(2))
        self.head = nn.Linear(dim, 256)

    def forward(self, ids_BS: Tensor) -> Tensor:
        before = F.pad(self.embedding(ids_BS).transpose(1, 2), (3, 0))
        h = self.context(before).transpose(1, 2)
        for layer in self.layers:
            h = h + layer(F.rms_norm(h, h.shape[-1:]))
        return self.head(h)


def train(name: str, policies: list[Policy], top_p: float | None, steps: int, text: Tensor) -> None:
    torch.manual_seed(0)
    model = Model(top_p)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    balancer, losses = Balancer(model, policies, optimizer), []
    for _ in range(steps):
        ids_BS = text[torch.randint(len(text) - LENGTH, (ROWS, 1)) + torch.arange(LENGTH)]
        logits, targets = model(ids_BS)[:, :-1], ids_BS[:, 1:]
        loss = balancer.tap(F.cross_entropy(logits.flatten(0, 1), targets.flatten()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    load_E = torch.stack([counts_E / counts_E.double().mean() for counts_E in balancer.load()]).mean(dim=0)
    last, found = losses[-max(1, steps // 4) :], balancer.metrics()
    print(f"{name}: loss {sum(last) / len(last):.3f}, active width {found['balance/active_width']:.0f}", end="")
    print(f", {found['balance/experts_per_token']:.2f} experts a token" if top_p is not None else "")
    print("   width " + "".join(f"{width:6}" for width in WIDTHS))
    print("   load  " + "".join(f"{load:6.2f}" for load in load_E.tolist()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--top-p", type=float, help="a token uses the experts that have this much probability together")
    arguments = parser.parse_args()
    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8).long()
    entropy: list[Policy] = [] if arguments.top_p is None else [EntropyLoss(3e-2)]
    for name, costs in (("plain loss", None), ("parameter penalty", "width")):
        policies: list[Policy] = [AuxLoss("micro_batch", coef=0.1, costs=costs), *entropy]
        train(name, policies, arguments.top_p, arguments.steps, text)


if __name__ == "__main__":
    main()
