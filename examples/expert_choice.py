"""Experts that choose their tokens from the whole batch (DiffMoE), in a loop of your own: digits out of noise.

A rectified flow on the 8 x 8 digits of scikit-learn (pip install 'equipoise[images]'). In training each expert takes
the tokens that it scores highest among all images and noise levels of the step, of all its micro-batches; afterwards a
predictor says which tokens it would take. Printed is what that decides: experts for a token at each noise level.

    python examples/expert_choice.py
    python examples/expert_choice.py --scope sample      # each image by itself: every level gets the same
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise import ExpertChoiceMoE, TokenPools

IMAGES, MICRO_BATCHES, EXPERTS = 64, 2, 8


class Model(nn.Module):
    """Rows of an image as tokens, told the noise level; attention, then experts, twice."""

    def __init__(self, scope: str, dim: int = 64) -> None:
        super().__init__()
        self.embed, self.place, self.out = nn.Linear(8, dim), nn.Parameter(torch.zeros(8, dim)), nn.Linear(dim, 8)
        self.level = nn.Sequential(nn.Linear(1, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.mix = nn.ModuleList(nn.MultiheadAttention(dim, 4, batch_first=True) for _ in range(2))
        self.experts = nn.ModuleList(ExpertChoiceMoE(dim, 64, EXPERTS, scope=scope) for _ in range(2))

    def forward(self, noisy: Tensor, t_B: Tensor) -> Tensor:
        h = self.embed(noisy) + self.place + self.level(t_B.view(-1, 1, 1))
        for mix, experts in zip(self.mix, self.experts, strict=True):
            x = F.rms_norm(h, h.shape[-1:])
            h = h + mix(x, x, x, need_weights=False)[0]
            h = h + experts(F.rms_norm(h, h.shape[-1:]))
        return self.out(h)


def error(model: Model, images: Tensor, t_B: Tensor, noise: Tensor) -> Tensor:
    """Of the velocity from image to noise, at the point t on the line between them."""
    t = t_B.view(-1, 1, 1)
    return (model((1 - t) * images + t * noise, t_B) - (noise - images)).square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scope", default="global_batch", help="sample, micro_batch, global_batch")
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    digits = torch.from_numpy(load_digits().images).float() / 8 - 1

    model = Model(arguments.scope)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    pools = TokenPools(model, optimizer)  # its thresholds move when the optimizer has stepped
    for step in range(arguments.steps):
        images = digits[torch.randint(len(digits), (IMAGES,))]
        drawn = images, torch.rand(IMAGES), torch.randn_like(images)
        cut = list(zip(*(one.chunk(MICRO_BATCHES) for one in drawn), strict=True))
        total = 0.0
        for micro_batch in pools.micro_batches(cut, lambda one: error(model, *one)):
            loss = error(model, *micro_batch)
            ((loss + pools.loss()) / MICRO_BATCHES).backward()
            total += loss.item() / MICRO_BATCHES
        optimizer.step()
        optimizer.zero_grad()
        if step in (0, arguments.steps - 1):
            print(f"step {step + 1}: error {total:.3f}")

    model.eval()
    taken: list[int] = []
    for layer in model.experts:
        layer.gate.register_forward_hook(lambda _, __, choice: taken.append(len(choice.token_ids_P)))
    for level in (0.1, 0.5, 0.9):
        taken.clear()
        with torch.no_grad():
            found = error(model, digits, torch.full((len(digits),), level), torch.randn_like(digits))
        experts = "  ".join(f"layer {i}: {pairs / digits[..., 0].numel():.2f}" for i, pairs in enumerate(taken))
        print(f"noise {level}: error {found:.3f}, experts for a token  {experts}")


if __name__ == "__main__":
    main()
