"""Two folders of small images, bright on the left or on the right, and the configuration of a run of seconds."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.lab.diffusion.config import DiffusionConfig, ImageConfig, ModelConfig, TrainConfig


def draw(left: bool, rng: np.random.Generator) -> np.ndarray:
    """(8, 8) uint8: a light half, a dark one, and noise."""
    image = rng.integers(0, 60, (8, 8))
    image[:, slice(0, 4) if left else slice(4, 8)] += 150
    return image.astype(np.uint8)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, left in (("left", True), ("right", False)):
        (root / name).mkdir()
        for number in range(20):
            Image.fromarray(draw(left, rng)).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture
def config(folder) -> DiffusionConfig:
    """Layers 1 and 3 of 4 have experts; 16 tokens an image."""
    return DiffusionConfig(
        model=ModelConfig(layers=4, width=16, heads=2, experts=4, hidden=16),
        data=ImageConfig(data=str(folder), held_out=0.25),
        train=TrainConfig(steps=6, images=8, images_per_micro_batch=4, warmup=1, eval_every=3, levels=4, draws=1,
                          samples=2, sample_steps=3, checkpoint_every=2),
        strategy="batch",
    )  # fmt: skip
