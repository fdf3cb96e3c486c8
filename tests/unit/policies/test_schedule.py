"""Switches: which policy acts at which step, against asking the switch itself at every step."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.policies import AuxLoss, ExpertBias, Switch, ZLoss
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
    with pytest.raises(ConfigError, match="AuxLoss, ZLoss, ExpertBias or Switch"):
        Schedule(["micro"])  # pyright: ignore
