"""Switches: which policy acts at which step, against asking the switch itself at every step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.policies import AuxLoss, ExpertBias, Sequences, Switch, ZLoss
from equipoise.policies.schedule import Schedule

plain = st.sampled_from([None, AuxLoss("micro_batch", 0.1), AuxLoss("global_batch", 0.2), ZLoss(0.3), ExpertBias()])
switches = st.recursive(
    plain, lambda inner: st.builds(Switch, at=st.integers(0, 12), to=inner, first=inner), max_leaves=6
)


def acting(policy, step: int):
    while isinstance(policy, Switch):
        policy = policy.to if step >= policy.at else policy.first
    return policy


@settings(max_examples=150, deadline=None)
@given(st.lists(switches.filter(lambda policy: policy is not None), max_size=4))
def test_at_every_step_exactly_the_policies_that_the_switches_name_act(policies):
    flat = list(Schedule(policies))
    for step in range(15):
        want = [(i, acting(p, step)) for i, p in enumerate(policies) if acting(p, step) is not None]
        assert [(t.index, t.policy) for t in flat if t.active(step)] == want
    assert all(t.end is None or t.start < t.end for t in flat)


@pytest.mark.parametrize("at", [-1, 2.5, "10", None])
def test_a_step_is_a_whole_number(at):
    with pytest.raises(ConfigError, match="whole step"):
        Switch(at=at, to=ZLoss())


@pytest.mark.parametrize("side", ["micro_batch", 0.1, ZLoss])
def test_only_policies_can_be_switched(side):
    with pytest.raises(ConfigError, match="policy"):
        Switch(at=1, to=side)
    with pytest.raises(ConfigError, match="policy"):
        Switch(at=1, to=None, first=side)


def test_what_is_no_policy_has_no_place_in_a_list():
    with pytest.raises(ConfigError, match="AuxLoss, EntropyLoss, ZLoss, ExpertBias or Switch"):
        Schedule(["micro"])  # pyright: ignore


# ---------------------------------------------------------------- names


def test_names_are_what_policies_are_and_their_own_where_they_have_one():
    policies = [
        AuxLoss("global_batch"),
        AuxLoss("micro_batch"),
        AuxLoss("micro_batch", name="kept_fast"),
        AuxLoss("micro_batch"),
        AuxLoss(Sequences(8)),
        ZLoss(),
        ExpertBias("momentum"),
        ExpertBias("momentum", name="slow"),
    ]
    schedule = Schedule(policies)
    assert schedule.names == ("global", "micro", "kept_fast", "micro_2", "sequences_8", "z", "bias", "slow")
    assert [one.term for one in schedule] == [0, 1, 2, 3, 4, -1, -1, -1]
    assert [one.state_name for one, _ in schedule.biases] == [
        "momentum(kappa=2.0, beta=0.5)",
        "slow: momentum(kappa=2.0, beta=0.5)",
    ]
    assert Schedule([AuxLoss("micro_batch"), AuxLoss("global_batch", name="micro")]).names == ("micro_2", "micro")


@pytest.mark.parametrize("name", ["", "a/b", "layer_00", "1st", 3, "with space"])
def test_a_name_that_cannot_be_part_of_a_metric_s_is_refused(name):
    for policy in (AuxLoss, ZLoss, ExpertBias):
        with pytest.raises(ConfigError, match=r"(?s)policy's name.*balance/global/loss"):
            policy(name=name)


def test_two_policies_of_one_name_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)a name of its own.*name='one' on 2 of them"):
        Schedule([AuxLoss(name="one"), ZLoss(name="one")])


def test_what_backward_has_to_know_of_other_ranks():
    filled, prefix = Schedule([AuxLoss()]), Schedule([AuxLoss(), AuxLoss(estimator="prefix")])
    options = {"counted": False, "measuring": False}
    assert [filled.counts_needed(0, m, **options) for m in (1, 2, 3, 4, 7)] == ["step", "step", "none", "step", "none"]
    assert prefix.counts_needed(0, 3, **options) == "micro_step"
    assert filled.counts_needed(0, 3, counted=False, measuring=True) == "micro_step"
    exact = Schedule([AuxLoss(estimator="exact")])
    assert exact.counts_needed(0, 1, **options) == "micro_step"
    assert exact.counts_needed(0, 1, counted=True, measuring=False) == "none"
    later = Schedule([Switch(at=2, to=AuxLoss(estimator="prefix"))])
    assert [later.counts_needed(step, 1, **options) for step in (1, 2)] == ["none", "micro_step"]
