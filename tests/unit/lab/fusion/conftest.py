"""Two folders of images of 4 x 4 pixels, bright on the left or on the right, a small text, and a run of seconds."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.lab.fusion.config import FusionConfig, FusionDataConfig, ModelConfig, TrainConfig
from equipoise.lab.fusion.data import load_fused


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    from PIL import Image

    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, left in (("left", True), ("right", False)):
        (root / name).mkdir()
        for number in range(20):
            image = rng.integers(0, 60, (4, 4))
            image[:, slice(0, 2) if left else slice(2, 4)] += 150
            Image.fromarray(image.astype(np.uint8)).save(root / name / f"{number:02}.png")
    return root


@pytest.fixture
def config(image_folder, corpus_file) -> FusionConfig:
    """2 layers of 4 experts; sequences of 12 text tokens, 16 pixels and two marks."""
    return FusionConfig(
        model=ModelConfig(layers=2, width=16, heads=2, experts=4, image_experts=2, hidden=16),
        data=FusionDataConfig(data=str(image_folder), text=str(corpus_file), levels=5, vocabulary=300, text_tokens=12,
                              held_out=0.25),
        train=TrainConfig(steps=6, sequences=4, warmup=1, eval_every=3, eval_sequences=8, checkpoint_every=2),
        strategy="groups-choice",
    )  # fmt: skip


@pytest.fixture
def fused(config):
    return load_fused(config.data)
