"""Biases that chase a load for long: the average against loops, what leaves it alone, what is saved of it."""

from __future__ import annotations

import pytest
import torch

from contracts.law.test_signals import shown
from equipoise import Balancer, ExpertBias, TokenLayout, record_routing, replay_routing
from equipoise.balancer.bias_drift import bias_drift
from equipoise.functional.load_view import LoadView
from equipoise.layers import Router

EXPERTS, TOKENS = 4, 32


def skewed(policy: ExpertBias, skew: float = 1.0, layers: int = 1) -> tuple[torch.nn.ModuleList, Balancer]:
    """Routers of which the first expert's logits are higher by ``skew``: the last input is 1."""
    torch.manual_seed(0)
    routers = torch.nn.ModuleList(Router(4, EXPERTS, 1, gate="sigmoid") for _ in range(layers))
    with torch.no_grad():
        for router in routers:
            router.weight[:, 3] = torch.tensor([skew, 0.0, 0.0, 0.0])
    return routers, Balancer(routers, [policy])


def inputs(seed: int) -> torch.Tensor:
    x_TD = torch.randn(TOKENS, 4, generator=torch.Generator().manual_seed(seed))
    x_TD[:, 3] = 1
    return x_TD


def train(routers: torch.nn.ModuleList, balancer: Balancer, seed: int) -> None:
    optimizer = torch.optim.SGD(routers.parameters(), lr=0.0)
    loss = sum(router(inputs(seed), TokenLayout(1)).weights_TK.square().sum() for router in routers)
    balancer.tap(loss).backward()
    optimizer.step()


def by_loops(before: list[float], counts: list[int]) -> list[float]:
    """Half of the share or less is 1, half too much or more is -1."""
    share, after = sum(counts) / len(counts), []
    for old, count in zip(before, counts, strict=True):
        far = 1 if count <= share / 2 else -1 if count >= 1.5 * share else 0
        after.append(old + (far - old) / 100)
    return after


def drift(balancer: Balancer, name: str = "0") -> list[float]:
    return balancer.state_dict()["layers"][name]["drift_E"].tolist()


@pytest.mark.parametrize("rule", ["sign", "proportional", "momentum"])
def test_the_average_is_that_of_loops(rule):
    routers, balancer = skewed(ExpertBias(rule, 1e-2), layers=2)
    assert all(state["drift_E"] is None for state in balancer.state_dict()["layers"].values())
    wanted = [[0.0] * EXPERTS] * 2
    for seed in range(20):
        train(routers, balancer, seed)
        wanted = [by_loops(*pair) for pair in zip(wanted, [one.tolist() for one in balancer.load()], strict=True)]
        assert [drift(balancer, name) for name in "01"] == [pytest.approx(one, abs=1e-12) for one in wanted]
    assert min(wanted[0]) < -0.05


def test_a_load_is_far_from_what_was_asked_for():
    """Three quarters to the second are far from a quarter that was wanted, and not from three."""
    counts_LE = torch.tensor([[25, 75]])
    moved_L1 = torch.ones(1, 1, dtype=torch.bool)
    for first, far in ((0.75, [0.01, -0.01]), (0.25, [0.0, 0.0])):
        view = LoadView(targets=(first, 1 - first))
        assert bias_drift(None, counts_LE, view, moved_L1).tolist() == [pytest.approx(far)]


def test_what_moves_no_bias_leaves_the_average():
    """A layer without tokens, a frozen rate, a frozen router and a step of recorded experts."""
    old_LE = torch.tensor([[0.5, -0.5], [0.5, -0.5]], dtype=torch.float64)
    moved_L1 = torch.tensor([[True], [False]])
    assert torch.equal(bias_drift(old_LE, torch.tensor([[0, 0], [9, 1]]), None, moved_L1), old_LE)
    routers, balancer = skewed(ExpertBias("sign", 1e-3, schedule=lambda step: float(step != 2)), layers=2)
    seen = []
    for step in range(3):
        train(routers, balancer, step)
        seen.append(drift(balancer))
    assert seen[0] != seen[1] == seen[2], "rate 0 at step 2"
    with record_routing(routers) as record:
        for router in routers:
            router(inputs(3), TokenLayout(1))
    with replay_routing(routers, record):
        train(routers, balancer, 3)
    assert drift(balancer) == seen[2]
    routers[1].requires_grad_(False)
    still = drift(balancer, "1")
    train(routers, balancer, 4)
    assert drift(balancer) != seen[2] and drift(balancer, "1") == still


def test_a_rate_too_small_is_named_after_some_hundred_steps_and_one_that_settles_is_not():
    for rate, want in ((1e-5, {"drifting_bias": 1.0}), (1e-2, {})):
        routers, balancer = skewed(ExpertBias("sign", rate))
        for step in range(235):
            train(routers, balancer, step)
            if step == 200:
                assert shown(balancer) == {}
        assert shown(balancer) == want
        assert ("drifting_bias, layer 0" in balancer.describe()) == bool(want)
        assert not any("drift" in name for name in balancer.metrics() if "signals" not in name)


def test_it_is_saved_and_a_state_from_before_begins_at_zero():
    routers, balancer = skewed(ExpertBias("sign", 1e-3))
    for step in range(5):
        train(routers, balancer, step)
    state = balancer.state_dict()
    before = drift(balancer)
    train(routers, balancer, 5)
    after, bias_E = drift(balancer), routers[0].expert_bias.clone()
    routers[0].expert_bias.copy_(state["layers"]["0"]["expert_bias_E"])
    balancer.load_state_dict(state)
    assert drift(balancer) == before
    train(routers, balancer, 5)
    assert drift(balancer) == after and torch.equal(routers[0].expert_bias, bias_E)
    state = balancer.state_dict()
    del state["layers"]["0"]["drift_E"]
    balancer.load_state_dict(state)
    train(routers, balancer, 6)
    assert drift(balancer) == pytest.approx(by_loops([0.0] * EXPERTS, balancer.load()[0].tolist()))
