"""Names of strategies and settings: what they make, and what is refused with a remedy."""

from __future__ import annotations

import pytest

from equipoise import AuxLoss, ConfigError, ExpertBias, ExpertChoiceMoE, MoE
from equipoise.lab.diffusion.config import ModelConfig, TrainConfig, read_config
from equipoise.lab.diffusion.strategies import read_strategy
from equipoise.layers import SwiGLU

MODEL = ModelConfig(width=16, heads=2, experts=4, hidden=8)


@pytest.mark.parametrize(
    ("name", "scope"), [("sample", 1), ("samples:8", 8), ("samples:1", 1), ("batch", "global_batch")]
)
def test_experts_choose_from_a_pool(name, scope):
    layer = read_strategy(name).layer(MODEL)
    assert isinstance(layer, ExpertChoiceMoE) and layer.gate.scope == scope


def test_tokens_choose_with_policies_of_the_library():
    strategy = read_strategy("global")
    layer = strategy.layer(MODEL)
    assert isinstance(layer, MoE) and layer.gate.top_k == 1
    assert strategy.build(10) == [AuxLoss("global_batch", coef=0.01, estimator="exact")]
    assert read_strategy("none").build(10) == [AuxLoss("global_batch", coef=0.0)]
    free = read_strategy("loss-free")
    assert isinstance(free.build(10)[0], ExpertBias) and free.layer(MODEL).gate.gate == "sigmoid"
    assert isinstance(read_strategy("dense").layer(MODEL), SwiGLU)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("bach", "did you mean 'batch'"), ("samples:0", "samples:N with N of 1 or more"),
     ("samples", "samples:N with N of 1 or more"), ("batch:8", "a strategy: "), ("global:nothing", "detail of global"),
     ("document", "by documents"), ("micro->document:3", "by documents"), ("global:rare=0.2", "detail of global")],
)  # fmt: skip
def test_a_wrong_name_is_refused(name, expected):
    with pytest.raises(ConfigError, match=expected):
        read_strategy(name)


def test_half_an_expert_is_for_experts_that_choose():
    half = ModelConfig(width=16, heads=2, experts=4, hidden=8, capacity=1.5)
    assert read_strategy("batch").layer(half).gate.capacity == 1.5
    with pytest.raises(ConfigError, match=r"a whole model\.capacity where tokens choose"):
        read_strategy("global").layer(half)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"model.capacity": 9.0}, "0 < capacity <= num_experts"),
        ({"model.capacity": 0.0}, r"model.capacity above 0"),
        ({"model.layers": 1}, "model.layers of 2 or more"),
        ({"model.width": 30}, "model.width / model.heads"),
        ({"model.checkpointing": "all"}, "kind of checkpointing"),
        ({"data.held_out": 1.0}, "data.held_out below 1"),
        ({"data.size": 16}, "data.size with a folder of images"),
        ({"train.images": 10}, "train.images_per_micro_batch divides"),
        ({"train.steps": 0}, "train.steps above 0"),
        ({"train.stpes": 5}, "did you mean train.steps"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, expected):
    with pytest.raises(ConfigError, match=expected):
        read_config(values=values)


def test_a_file_and_what_is_over_it(tmp_path):
    (tmp_path / "run.toml").write_text('strategy = "sample"\n[train]\nsteps = 7\nlr = 0.5\n')
    config = read_config(tmp_path / "run.toml", {"train.lr": 0.25, "data.data": "images"})
    assert (config.strategy, config.train.steps, config.train.lr) == ("sample", 7, 0.25)
    assert config.data.data.startswith("/"), "a run goes on from any folder"
    assert config.train == TrainConfig(steps=7, lr=0.25)
