"""Routing that no load can show to be ill is told when a balancer is made, and each remedy that is named works."""

from __future__ import annotations

import re
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, MoE, Router, ZLoss
from equipoise.autograd.protocol import RouterTraits
from equipoise.balancer.degenerate import check_degenerate
from equipoise.policies import Schedule

UNTAUGHT = "weights through which the model's loss teaches the router; got top-1 with normalised weights"
ZERO = re.escape("got weights that are multiplied by 0 (gate)")
PUSH = [AuxLoss("global_batch", 0.1)]


def layers(*options: dict[str, Any]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(MoE(**({"dim": 8, "hidden": 8, "num_experts": 4, "top_k": 2} | one)) for one in options))


def gradient_of_the_task(model: nn.Module) -> float:
    """At the routers, of a loss without balance."""
    model(torch.randn(2, 6, 8)).square().mean().backward()
    norms = [m.weight.grad.norm() for m in model.modules() if isinstance(m, Router)]
    model.zero_grad()
    return float(torch.stack(norms).norm())


def step(model: nn.Module, policies: list) -> dict[str, float]:
    balancer = Balancer(model, policies)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer.tap(model(torch.randn(2, 6, 8)).square().mean()).backward()
    optimizer.step()
    found = balancer.metrics()
    balancer.remove()
    return found


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize(("normalize", "learns"), [(None, True), (False, True), (True, False)])
def test_top_1_learns_by_default_and_is_told_of_where_it_cannot(gate, normalize, learns):
    model = layers({"top_k": 1, "gate": gate} | ({} if normalize is None else {"normalize": normalize}))
    assert (gradient_of_the_task(model) > 1e-4) == learns
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        Balancer(model, PUSH)
    assert [UNTAUGHT in str(one.message) for one in told] == [] if learns else [True]
    assert all(one.filename == __file__ for one in told)


def test_two_experts_keep_normalised_weights_and_one_does_not():
    assert [Router(4, 4, k).normalize for k in (1, 2, 4)] == [False, True, True]
    assert Router(4, 4, 1, normalize=True).normalize and not Router(4, 4, 2, normalize=False).normalize


@pytest.mark.parametrize(("policies", "left"), [
    (PUSH, "only the policies' own loss moves it"),
    ([ZLoss()], "only the policies' own loss moves it"),
    ([ExpertBias(rate=0.01, rule="proportional")], "nothing moves it"),
    ([AuxLoss(coef=0.0)], "nothing moves it"),
])  # fmt: skip
def test_it_says_what_is_left_to_move_the_router(policies, left):
    with pytest.warns(UserWarning, match=left):
        Balancer(layers({"top_k": 1, "normalize": True}), policies)


def test_both_remedies_of_an_untaught_router_teach_it():
    for remedy in ({"top_k": 1, "normalize": False}, {"top_k": 2, "normalize": True}):
        model = layers(remedy)
        assert gradient_of_the_task(model) > 1e-4
        Balancer(model, PUSH)  # a warning would be an error here


def test_only_the_layers_that_it_is_of_are_named_and_not_all_of_many():
    with pytest.warns(UserWarning, match=re.escape("(1.gate)")):
        Balancer(layers({}, {"top_k": 1, "normalize": True}), PUSH)
    with pytest.warns(UserWarning, match=re.escape("(0.gate, 1.gate, 2.gate and 2 more)")):
        Balancer(layers(*[{"top_k": 1, "normalize": True}] * 5), PUSH)


def test_a_frozen_router_is_to_learn_nothing():
    model = layers({"top_k": 1, "normalize": True}, {})
    model[0].gate.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"frozen: 0\.gate") as told:
        Balancer(model, PUSH)
    assert len(told) == 1


def test_weights_times_zero_are_told_of_and_the_remedy_works():
    model = MoE(8, 8, 4, 2, scale=0.0)
    assert gradient_of_the_task(model) == 0
    with pytest.warns(UserWarning, match=ZERO):
        Balancer(model, PUSH).remove()
    model.gate.scale = 0.5
    assert gradient_of_the_task(model) > 0
    Balancer(model, PUSH)


@pytest.mark.parametrize("policies", [PUSH, [ExpertBias(rate=0.01, rule="proportional")], [*PUSH, ZLoss()]])
@pytest.mark.parametrize("experts", [1, 4])
def test_where_all_go_to_all_a_policy_that_should_push_is_refused(policies, experts):
    model = layers({"num_experts": experts, "top_k": experts})
    pattern = rf"(?s)leave some experts out.*got: top_k={experts} of {experts} experts \(0.gate\).*do:  .*top_k < num"
    with pytest.raises(ConfigError, match=pattern):
        Balancer(model, policies)
    assert model[0].gate.balance_state is None and model[0].gate.expert_bias is None  # nothing was changed


@pytest.mark.parametrize("policies", [[ZLoss()], [AuxLoss(coef=0.0)], [ExpertBias(rate=0.0)]])
def test_a_soft_mixture_may_be_measured_by_its_gate(policies):
    """The remedies: another mixture is balanced, this one measured."""
    found = step(layers({"top_k": 4, "normalize": False}), policies)
    assert "balance/maxvio_global" not in found and 0 < found["balance/maxvio_gate"] < 3
    assert "balance/maxvio_global" in step(layers({"top_k": 3}), PUSH)


def test_of_several_layers_those_without_a_choice_are_named_and_in_no_mean():
    model = layers({"top_k": 4}, {})
    with pytest.warns(UserWarning, match=r"every token goes to every expert there: 0\.gate"):
        mixed = step(model, PUSH)
    assert mixed["balance/maxvio_global"] == mixed["balance/layer_01/maxvio_global"]
    assert not {"balance/layer_00/maxvio_global", "balance/layer_00/dead_experts"} & mixed.keys()
    assert mixed["balance/global/loss"] != pytest.approx(1.0, abs=1e-6)
    assert mixed["balance/layers_without_tokens"] == 0


def test_experts_that_do_no_work_leave_the_others_a_choice():
    """Another library's router: a token that chose one of its two idle experts left another out."""
    weight = nn.Parameter(torch.ones(1))
    traits = RouterTraits(idle_experts=2)
    router = SimpleNamespace(num_experts=4, top_k=4, traits=traits, parameters=lambda: iter([weight]))
    check_degenerate([(0, "router", router)], Schedule(PUSH))
    router.traits = RouterTraits()
    with pytest.raises(ConfigError, match="top_k=4 of 4 experts"):
        check_degenerate([(0, "router", router)], Schedule(PUSH))
