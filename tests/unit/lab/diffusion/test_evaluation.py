"""What an evaluation says is what a loop over images, levels and tokens counts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equipoise.lab.diffusion.evaluation import evaluate, level_names
from equipoise.lab.diffusion.flow import flow_loss
from equipoise.lab.diffusion.images import load_images
from equipoise.lab.diffusion.model import DiT
from equipoise.lab.diffusion.strategies import read_strategy


@pytest.fixture
def images(config):
    return load_images(config.data, config.model.patch)


def model_of(config, strategy: str) -> DiT:
    model = DiT(config.model, read_strategy(strategy), channels=1, side=8, classes=2)
    torch.manual_seed(0)
    for p in model.parameters():
        nn.init.normal_(p, std=0.3)
    for module in model.modules():
        if getattr(module, "thresholds", None) is not None:
            module.thresholds.fill_(0.5)
    return model.train()


@pytest.mark.parametrize("strategy", ["batch", "sample", "global", "dense"])
def test_it_is_the_loop_over_images_and_levels(config, images, strategy):
    model, levels, experts = model_of(config, strategy), 3, 1 if strategy == "dense" else 4
    found = evaluate(model, images, step=5, levels=levels, draws=2, images_per_micro_batch=4)
    assert model.training and found.step == 5
    model.eval()
    losses: list[list[float]] = [[] for _ in range(levels)]
    counts = torch.zeros(levels, 2, experts, dtype=torch.int64)
    per_image: list[list[list[int]]] = []  # [image and turn][layer][expert]
    scores: list[list[list[float]]] = [[] for _ in range(levels)]
    seen: list = []
    for layer in (1, 3):
        module = model.blocks[layer].feed_forward
        gate = module if strategy == "dense" else module.gate
        gate.register_forward_hook(lambda _, args, out: seen.append(out))
    for turn in range(2 * levels):
        noise = torch.randn(images.held_out.shape, generator=torch.Generator().manual_seed(turn))
        for i, image in enumerate(images.held_out):
            level = (i + turn) % levels
            t_B = torch.tensor([(level + 0.5) / levels])
            seen.clear()
            with torch.no_grad():
                loss = flow_loss(model, image[None], images.held_out_labels[i : i + 1], noise[i : i + 1], t_B)
            losses[level].append(loss.item())
            per_image.append([])
            scores[level].append([])
            for layer, out in enumerate(seen):
                if strategy != "dense":
                    weights = out.weights_TK if strategy == "global" else out.weights_P
                    scores[level][-1].append(float(weights.sum()) / 16)
                ids = (
                    [0] * 16
                    if strategy == "dense"
                    else (out.expert_ids_TK if strategy == "global" else out.expert_ids_P).flatten().tolist()
                )
                for e in ids:
                    counts[level, layer, e] += 1
                per_image[-1].append([ids.count(e) for e in range(experts)])
    assert list(found.loss) == level_names(levels) == ["0.1667", "0.5", "0.8333"]
    assert list(found.loss.values()) == pytest.approx([sum(one) / len(one) for one in losses], rel=1e-5)
    assert found.counts == counts.tolist()
    assert found.tokens == dict.fromkeys(found.loss, 2 * 10 * 16)
    of_image = torch.tensor(per_image).double()
    ratio_NL = of_image.amax(dim=2) / of_image.mean(dim=2).clamp(min=1e-9) - 1
    ratio_NL = torch.where(of_image.sum(dim=2) > 0, ratio_NL, 0.0)
    assert found.maxvio_sequence == pytest.approx(ratio_NL.mean(dim=0).tolist())
    assert found.dead_experts == (counts.sum(dim=0) == 0).sum(dim=1).tolist()
    if strategy != "dense":
        want = [[sum(column) / len(column) for column in zip(*rows, strict=True)] for rows in scores]
        for got_L, want_L in zip(found.topk_score, want, strict=True):
            assert got_L == pytest.approx(want_L, rel=1e-4)
    if strategy == "sample":  # equal loads in every image: nothing is known of the level
        assert found.maxvio_sequence == [0.0, 0.0] and found.mutual_information == pytest.approx([0, 0], abs=1e-12)
    if strategy in ("batch", "global"):
        total = counts.sum(dim=0).double()
        assert found.maxvio_global == pytest.approx((total.max(dim=1).values / total.mean(dim=1) - 1).tolist())
        joint = counts.double() / counts.sum(dim=2, keepdim=True) / levels  # each level has the same weight
        apart = joint.sum(dim=0, keepdim=True) * joint.sum(dim=2, keepdim=True)
        nats = torch.where(joint > 0, joint * (joint / apart).log(), 0.0).sum(dim=(0, 2))
        assert found.mutual_information == pytest.approx(nats.tolist(), rel=1e-6)


def test_two_evaluations_agree_and_draws_are_not_the_run_s(config, images):
    model = model_of(config, "batch")
    torch.manual_seed(1)
    first = evaluate(model, images, step=1, levels=2, draws=1, images_per_micro_batch=4)
    torch.manual_seed(2)
    assert evaluate(model, images, step=1, levels=2, draws=1, images_per_micro_batch=4) == first
