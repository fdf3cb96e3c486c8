"""The passes of a step: they divide it evenly, fit the memory, and are several where a policy depends on them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise import AuxLoss, ExpertBias, Switch, ZLoss
from equipoise.lab.config.schema import ModelConfig, RunConfig, TrainConfig
from equipoise.lab.training.micro_batching import FITS, PIECE, max_pass_size, num_passes, uses_shuffle


@given(micro_batches=st.integers(1, 200), most=st.integers(1, 200))
def test_passes_share_the_micro_batches_evenly_and_are_the_fewest(micro_batches, most):
    passes = num_passes(micro_batches, most)
    assert micro_batches % passes == 0
    assert micro_batches // passes <= most
    assert not [n for n in range(1, passes) if micro_batches % n == 0 and micro_batches // n <= most]


@pytest.mark.parametrize(
    ("policy", "several"),
    [
        (AuxLoss("micro_batch"), False),
        (AuxLoss("global_batch", estimator="exact"), False),
        (AuxLoss("global_batch", estimator="previous"), False),
        (AuxLoss("global_batch", estimator="filled"), True),
        (AuxLoss("shuffle"), True),
        (AuxLoss("data_parallel"), True),
        (ExpertBias(), False),
        (ZLoss(), False),
        (Switch(3, AuxLoss("global_batch", estimator="prefix"), AuxLoss("micro_batch")), True),
    ],
    ids=str,
)
def test_a_step_has_several_passes_where_a_policy_depends_on_them(policy, several):
    config = RunConfig(train=TrainConfig(precision="fp32"))
    assert (max_pass_size(config, [policy], compares=False) == PIECE) == several
    assert max_pass_size(config, [policy], compares=True) == PIECE


def test_the_size_of_a_pass_follows_the_memory_and_the_setting():
    config = RunConfig(train=TrainConfig(precision="fp32"))
    wide = replace(config, model=ModelConfig(width=4 * config.model.width))
    most, fewer = (max_pass_size(one, [], compares=False) for one in (config, wide))
    assert most == 4 * fewer == FITS // (config.data.sequence_length * config.model.width * config.model.layers)
    fixed = replace(config, train=replace(config.train, micro_batches_per_pass=3))
    assert max_pass_size(fixed, [AuxLoss("shuffle")], compares=True) == 3


def test_shuffle_is_found_inside_a_switch():
    assert uses_shuffle([Switch(1, AuxLoss("shuffle"), AuxLoss("micro_batch"))])
    assert not uses_shuffle([AuxLoss("global_batch"), ZLoss()])
