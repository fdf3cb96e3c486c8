"""A given model on two ranks is the run on one; what its class cannot share out is refused."""

from __future__ import annotations

import pytest

from equipoise.errors import ConfigError
from equipoise.lab.config.schema import ParallelConfig
from equipoise.lab.training.trainer import train
from unit.lab.models._given import folder_of, run_of, tiny
from unit.lab.training.test_distributed import CASES, assert_close
from unit.lab.training.test_trainer import numbers, weights

pytest.importorskip("transformers")
pytestmark = pytest.mark.xdist_group("ranks")


@pytest.mark.full
def test_two_ranks_make_the_same_run(ranks, corpus_file, tmp_path):
    folder = folder_of(tiny("deepseek_v3"), tmp_path / "model", corpus_file)
    config = run_of(folder, corpus_file, "loss-free+micro", lr=3e-4, clip=0.5, steps=2)
    train(config, tmp_path / "alone")
    losses = ranks.run(f"{CASES}:run", config, tmp_path / "two", ParallelConfig(), size=2)
    assert losses[0] == losses[1]
    assert_close(numbers(tmp_path / "two"), numbers(tmp_path / "alone"))
    assert_close(weights(tmp_path / "two")["model"], weights(tmp_path / "alone")["model"])
    for layout in (ParallelConfig(ep=2), ParallelConfig(fsdp=True)):
        found = ranks.run(f"{CASES}:refused", config, tmp_path / "none", layout, size=2)
        assert found[0][0] == ConfigError.__name__ and "leave out --ep and --fsdp" in found[0][1]
