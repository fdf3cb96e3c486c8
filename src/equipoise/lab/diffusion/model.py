"""A small diffusion transformer: noisy images in, the velocity of their flow out; experts in every second layer."""

from __future__ import annotations

import hashlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import SwiGLU
from .config import ModelConfig
from .strategies import Strategy

__all__ = ["DiT"]

TIME_SCALE = 1000.0  # noise levels in [0, 1] as the steps that sinusoids of this kind were made for
GATE_STD = 0.006  # of the released DiffMoE, for all routers


class DiT(nn.Module):
    """The velocity of noisy images at a noise level, given their class (adaLN-zero, arXiv 2212.09748).

    Two models with one seed and one configuration have the same weights wherever they have the same layers: each is
    drawn from a seed made of ``seed`` and its own name.

    >>> from equipoise.lab.diffusion.strategies import read_strategy
    >>> model = DiT(ModelConfig(layers=2, width=16, heads=2), read_strategy("batch"), channels=1, side=8, classes=10)
    >>> model(torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([0, 1, 2])).shape
    torch.Size([3, 1, 8, 8])
    """

    def __init__(
        self, config: ModelConfig, strategy: Strategy, *, channels: int, side: int, classes: int, seed: int = 0
    ) -> None:
        super().__init__()
        self.config, self.side = config, side
        pixels = channels * config.patch**2
        self.embed = nn.Linear(pixels, config.width)
        self.position = nn.Parameter(torch.empty((side // config.patch) ** 2, config.width))
        self.time = nn.Sequential(
            nn.Linear(config.width, config.width), nn.SiLU(), nn.Linear(config.width, config.width)
        )
        self.label = nn.Embedding(classes, config.width)
        feed_forward = [
            strategy.layer(config) if at % 2 else SwiGLU(config.width, config.hidden) for at in range(config.layers)
        ]
        self.blocks = nn.ModuleList(Block(config.width, config.heads, layer) for layer in feed_forward)
        self.modulation = nn.Linear(config.width, 2 * config.width)
        self.out = nn.Linear(config.width, pixels)
        self.reset_parameters(seed)

    @torch.no_grad()
    def reset_parameters(self, seed: int) -> None:
        """Weights N(0, 1 / inputs), biases 0; what modulates and what leaves the model begins at 0 (adaLN-zero)."""
        for name, parameter in self.named_parameters():
            digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            if parameter.ndim < 2 or "modulation" in name or name.startswith("out."):
                parameter.zero_()
            elif name.endswith("gate.weight"):
                parameter.normal_(0.0, GATE_STD, generator=generator)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)

    def forward(self, x: Tensor, t_B: Tensor, labels_B: Tensor) -> Tensor:
        """(B, channels, side, side) noisy images, noise levels in [0, 1] (1 is noise alone), classes; the shape of x.

        A balance loss sees each image as a sequence of its patches.
        """
        size, count = self.config.patch, self.side // self.config.patch
        patches = x.unflatten(2, (count, size)).unflatten(4, (count, size)).permute(0, 2, 4, 3, 5, 1)
        x_BSD = self.embed(patches.reshape(len(x), count * count, -1)) + self.position
        condition_BD = F.silu(self.time(_sinusoids(t_B, self.config.width)) + self.label(labels_B))
        for block in self.blocks:
            if self.config.checkpointing != "none" and torch.is_grad_enabled():
                reentrant = self.config.checkpointing == "reentrant"
                x_BSD = checkpoint(block, x_BSD, condition_BD, use_reentrant=reentrant)
            else:
                x_BSD = block(x_BSD, condition_BD)
        shift, scale = self.modulation(condition_BD).unsqueeze(1).chunk(2, dim=-1)
        pixels = self.out(_norm(x_BSD) * (1 + scale) + shift)
        return pixels.view(len(x), count, count, size, size, -1).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


class Block(nn.Module):
    """Attention over the patches of an image, then ``feed_forward``; both modulated by noise level and class."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed_forward = feed_forward
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x_BSD: Tensor, condition_BD: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(condition_BD).unsqueeze(1).chunk(6, dim=-1)
        q, k, v = self.qkv(_norm(x_BSD) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed_BSD = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x_BSD = x_BSD + gate * self.proj(mixed_BSD)
        return x_BSD + gate2 * self.feed_forward(_norm(x_BSD) * (1 + scale2) + shift2)


def _norm(x_BSD: Tensor) -> Tensor:
    return F.layer_norm(x_BSD, x_BSD.shape[-1:], eps=1e-6)


def _sinusoids(t_B: Tensor, width: int) -> Tensor:
    """(B, width): cosines and sines of the noise level at periods from 1 to 10,000 steps."""
    periods = torch.exp(-math.log(10_000) * torch.arange(width // 2, dtype=t_B.dtype, device=t_B.device) / (width // 2))
    angles = TIME_SCALE * t_B.unsqueeze(1) * periods
    return torch.cat([angles.cos(), angles.sin()], dim=1)
