"""From what a user names to a cluster and its strategies: what comes after what, and what has to fit together."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.errors import ConfigError
from equipoise.plan.loads import RecordedCounts, Skew, expected_maxvio
from equipoise.plan.scenario import make_scenario
from equipoise.plan.typical_skews import TYPICAL
from equipoise.storage.inspection_record import write_inspection
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_inspection


def test_defaults_then_presets_then_the_file_then_settings(tmp_path):
    file = tmp_path / "ours.toml"
    file.write_text('preset = "olmoe-1b-7b"\ngpu = "a100"\nep = 16\ngpus = 32\ntokens = 2048\n')
    c = make_scenario(settings={"ep": 32}, file=file).cluster
    assert (c.experts, c.tflops, c.ep, c.gpus, c.tokens, c.micro_batches) == (64, 312.0, 32, 32, 2048, 8)
    c = make_scenario(file=file, preset="deepseek-v3", gpu="h800").cluster
    assert (c.experts, c.tflops, c.ep) == (256, 989.0, 16)


def test_without_loads_the_typical_five_are_there():
    assert [one.loads for one in make_scenario().strategies] == list(TYPICAL.values())


def test_counts_bring_their_layers_and_experts(tmp_path):
    np.save(tmp_path / "mine.npy", np.ones((3, 2, 12)))
    found = make_scenario([tmp_path / "mine.npy"])
    assert (found.cluster.layers, found.cluster.experts, found.cluster.ep, found.cluster.top_k) == (2, 12, 4, 8)
    assert isinstance(found.strategies[0].loads, RecordedCounts)
    missing = "top_k, width, expert_hidden, dense_parameters"
    assert found.notes == [f"counts do not say {missing}: taken from qwen3-30b-a3b; use --preset or --set"]
    with pytest.raises(ConfigError, match="12 experts, as counted"):
        make_scenario([tmp_path / "mine.npy"], preset="lab")


def test_a_law_is_carried_over_and_said_to_be(tmp_path):
    write_run(tmp_path / "run", header("micro", 0, steps=20, experts=16))
    write_inspection(tmp_path / "look", synthetic_inspection(experts=8))
    found = make_scenario([tmp_path / "look", tmp_path / "run"])
    assert [one.name for one in found.strategies] == ["micro", "look"]
    assert [note.split(":")[0] for note in found.notes] == ["recorded with 8 experts", "recorded with 16 experts"]


@pytest.mark.parametrize(("over", "sources"), [(1, 2), (4, 8)])
def test_a_maxvio_is_that_of_as_many_gpus(over, sources):
    found = make_scenario(settings={"sequence": 2048, "tokens": 4096}, maxvio=["ours=0.8,0.2"], maxvio_over=over)
    (one,) = found.strategies
    assert isinstance(one.loads, Skew)
    pairs = over * 4096 * found.cluster.top_k
    assert expected_maxvio(one.loads, 128, sources, pairs, seed=3) == pytest.approx(0.8, rel=0.1)
    assert expected_maxvio(one.loads, 128, 10_000, 10**9, seed=3) == pytest.approx(0.2, rel=0.15)


def test_a_maxvio_without_a_name_or_a_second_number():
    found = make_scenario(maxvio=["0.05", "global:exact=0.9"]).strategies
    assert [(one.name, one.counts) for one in found] == [("maxvio 0.05", False), ("global:exact", True)]
    assert found[0].origin.endswith("0.05 over all text") and found[1].origin.endswith("0.1 over all text")


def test_only_the_named_strategies_in_their_order():
    assert [one.name for one in make_scenario(only="loss-free, micro,micro").strategies] == ["loss-free", "micro"]
    with pytest.raises(ConfigError, match="did you mean 'global'"):
        make_scenario(only="globl")
