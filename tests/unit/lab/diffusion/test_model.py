"""The transformer is loops over images, patches and pixels; strategies of a seed share all weights that they can."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from equipoise.lab.diffusion.config import ModelConfig
from equipoise.lab.diffusion.model import DiT
from equipoise.lab.diffusion.strategies import read_strategy

CONFIG = ModelConfig(layers=3, width=16, heads=2, experts=4, hidden=8)


def model_of(strategy: str, seed: int = 0, **settings) -> DiT:
    config = ModelConfig(**{**vars(CONFIG), **settings})
    return DiT(config, read_strategy(strategy), channels=3, side=8, classes=5, seed=seed)


def norm(x: Tensor) -> Tensor:
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-6).sqrt()


def naive(model: DiT, image: Tensor, t: float, label: int) -> Tensor:
    """One image in float64: its patches one by one, heads one by one, pixels put back one by one."""
    width, heads, size = 16, 2, 2
    corners = [(row, column) for row in range(0, 8, size) for column in range(0, 8, size)]
    pixels = [(row, column, channel) for row in range(size) for column in range(size) for channel in range(3)]
    tokens = [
        model.embed(torch.stack([image[c, top + r, left + k] for r, k, c in pixels])) + model.position[at]
        for at, (top, left) in enumerate(corners)
    ]
    angles = [1000 * t / 10_000 ** (i / (width // 2)) for i in range(width // 2)]
    sinusoids = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles], dtype=torch.float64)
    condition = model.time(sinusoids) + model.label.weight[label]
    condition = condition * condition.sigmoid()
    for block in model.blocks:
        shift, scale, gate, shift2, scale2, gate2 = block.modulation(condition).chunk(6)
        qkv = [block.qkv(norm(x) * (1 + scale) + shift).view(3, heads, -1) for x in tokens]
        mixed = []
        for q in qkv:
            of_heads = []
            for h in range(heads):
                scores = torch.stack([(q[0, h] * k[1, h]).sum() for k in qkv]) / math.sqrt(width // heads)
                of_heads.append(sum(p * v[2, h] for p, v in zip(scores.softmax(0), qkv, strict=True)))
            mixed.append(torch.cat(of_heads))
        tokens = [x + gate * block.proj(m) for x, m in zip(tokens, mixed, strict=True)]
        y = block.feed_forward(torch.stack([norm(x) * (1 + scale2) + shift2 for x in tokens]).unsqueeze(0))[0]
        tokens = [x + gate2 * one for x, one in zip(tokens, y, strict=True)]
    shift, scale = model.modulation(condition).chunk(2)
    made = torch.zeros_like(image)
    for (top, left), x in zip(corners, tokens, strict=True):
        for (r, k, c), value in zip(pixels, model.out(norm(x) * (1 + scale) + shift), strict=True):
            made[c, top + r, left + k] = value
    return made


@pytest.mark.parametrize("strategy", ["dense", "sample", "micro"])
def test_it_is_the_loop_over_images_patches_and_heads(strategy):
    torch.manual_seed(0)
    model = model_of(strategy).double()
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    x, t_B, labels_B = (
        torch.randn(2, 3, 8, 8, dtype=torch.float64),
        torch.tensor([0.1, 0.7]).double(),
        torch.tensor([4, 1]),
    )
    wanted = torch.stack([naive(model, x[i], t_B[i].item(), int(labels_B[i])) for i in range(2)])
    torch.testing.assert_close(model(x, t_B, labels_B), wanted, rtol=1e-9, atol=1e-10)


def test_strategies_of_a_seed_share_the_weights_of_equal_names():
    models = {name: dict(model_of(name).named_parameters()) for name in ("batch", "sample", "global", "dense")}
    batch, dense = models["batch"], models["dense"]
    assert models["sample"].keys() == models["global"].keys() < batch.keys()
    for name in models["sample"]:
        assert torch.equal(models["sample"][name], batch[name]) and torch.equal(models["global"][name], batch[name])
    common = dense.keys() & batch.keys()
    assert len(common) > 20 and all(torch.equal(dense[name], batch[name]) for name in common)
    other = dict(model_of("batch", seed=1).named_parameters())
    drawn = [name for name, p in batch.items() if p.any()]
    assert drawn and not any(torch.equal(batch[name], other[name]) for name in drawn)


def test_a_new_model_says_that_nothing_moves():
    """adaLN-zero: what leaves the model begins at 0."""
    assert not model_of("batch")(torch.randn(2, 3, 8, 8), torch.rand(2), torch.tensor([0, 1])).any()


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_recompute_gives_the_same_gradients(kind):
    found = []
    for checkpointing in ("none", kind):
        torch.manual_seed(0)
        model = model_of("sample", checkpointing=checkpointing)
        for p in model.parameters():
            nn.init.normal_(p, std=0.2)
        torch.manual_seed(1)
        model(torch.randn(4, 3, 8, 8), torch.rand(4), torch.tensor([0, 1, 2, 3])).square().mean().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(found[0], found[1])
