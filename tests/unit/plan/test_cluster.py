"""The description of a cluster: what follows from what, and what contradicts itself."""

from __future__ import annotations

import re

import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.plan.cluster import Cluster, describe, parse_settings, read_toml


def test_experts_ranks_and_pairs_of_a_group():
    c = Cluster(gpus=64, ep=16, experts=32, replicas=2, tokens=4096, sequence=1024, top_k=4)
    assert (c.parts, c.experts_per_rank, c.groups) == (8, 4, 4)
    assert (c.sources, c.pairs) == (16 * 4, 16 * 4096 * 4)


@pytest.mark.parametrize(
    ("settings", "gpus"), [({"ep": 24, "experts": 96}, 72), ({"ep": 8}, 64), ({"ep": 8, "gpus": 8}, 8)]
)
def test_gpus_that_were_not_given_are_a_multiple_of_ep(settings, gpus):
    assert describe(None, None, settings).gpus == gpus


def test_a_micro_batch_is_one_sequence_where_only_that_is_given():
    assert describe(None, None, {"sequence": 512}).tokens == 512
    assert describe(None, None, {"sequence": 512, "tokens": 1024}).tokens == 1024


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"top_k": 129}, "top_k <= experts"),
        ({"tokens": 2**25}, "tokens <="),
        ({"gpus": 20}, "ep divides gpus"),
        ({"replicas": 3}, "replicas divides ep"),
        ({"ep": 24, "gpus": 24}, "choose an ep that divides 128"),
        ({"ep": 256, "gpus": 256}, "replicas=2"),
        ({"layers": 0}, "layers > 0"),
        ({"layers": 2.5}, "a whole number"),
        ({"recompute": 1}, "true or false"),
        ({"placement": 1}, "a string for placement"),
        ({"tflops": float("nan")}, "tflops"),
        ({"overlap": 1.5}, "between 0 and 1"),
        ({"sync": "steps"}, "did you mean 'step'"),
    ],
)
def test_what_contradicts_itself_is_refused(settings, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        describe(None, None, {"gpus": 64} | settings)


def test_settings_are_values_or_names():
    found = parse_settings(["ep=16", "sync=step", "overlap = 0.5", "recompute=true"])
    assert found == {"ep": 16, "sync": "step", "overlap": 0.5, "recompute": True}
    for line in ("ep", "=3", "ep="):
        with pytest.raises(ConfigError, match="NAME=VALUE"):
            parse_settings([line])


def test_a_file_is_flat_toml(tmp_path):
    file = tmp_path / "ours.toml"
    file.write_text('preset = "lab"\nep = 2\n')
    assert read_toml(file) == {"preset": "lab", "ep": 2}
    for text, error in (("ep = = 3", DataError), ("[cluster]\nep = 8\n", ConfigError)):
        file.write_text(text)
        with pytest.raises(error):
            read_toml(file)
    with pytest.raises(DataError, match="a TOML file at"):
        read_toml(tmp_path / "no.toml")
