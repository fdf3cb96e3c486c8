"""What people miss, made to happen in a layer and named there, and not in the one beside it."""

from __future__ import annotations

import pytest
import torch

from contracts.law._model import make_step, net, train_step
from equipoise import AuxLoss, Balancer, ExpertBias, TokenLayout, ZLoss
from equipoise.balancer.signals import SIGNALS
from equipoise.layers import Router


def two_layers(*policies, **options):
    model = net(experts=(6, 6), top_k=(2, 2), **options)
    return model, Balancer(model, list(policies)), torch.optim.SGD(model.parameters(), lr=0.0)


def shown(balancer: Balancer) -> dict[str, float]:
    found = balancer.metrics()
    return {name: number for name in SIGNALS if (number := found[f"balance/signals/{name}"])}


def test_a_quiet_model_shows_none():
    model, balancer, optimizer = two_layers(AuxLoss("global_batch", 0.01), ExpertBias(), gate="sigmoid")
    assert "none yet" in balancer.describe()
    with torch.no_grad():
        for block in model.blocks:
            block.gate.weight.mul_(3)  # a gate that says something
    for seed in range(3):
        train_step(model, balancer, optimizer, make_step(seed, 4))
    assert shown(balancer) == {}
    assert "signals        none\n" in balancer.describe()


def test_a_flat_gate_and_uneven_loads():
    """Logits that differ in the seventh digit choose the same two experts for every token, at a loss of 1."""
    model, balancer, optimizer = two_layers(AuxLoss("micro_batch", 0.01))
    with torch.no_grad():
        model.blocks[1].gate.weight.mul_(1e-7)
        model.inp.weight.zero_()  # every token alike, but for what the first layer adds
        model.blocks[0].gate.weight.mul_(3)
    train_step(model, balancer, optimizer, make_step(0, 2))
    found = balancer.metrics()
    assert found["balance/layer_01/maxvio_gate"] < 1e-3 and found["balance/layer_01/maxvio_global"] > 1
    assert shown(balancer)["flat_gate"] == 1
    assert "flat_gate, layer 1: loads are uneven" in " ".join(balancer.describe().split())
    with torch.no_grad():
        model.blocks[1].gate.weight.zero_()
    measured = Balancer(twin := net(experts=(6,), top_k=(2,)), [ExpertBias("proportional", 1e-3)])
    with torch.no_grad():
        twin.blocks[0].gate.weight.mul_(1e-7)
    train_step(twin, measured, torch.optim.SGD(twin.parameters(), lr=0.0), make_step(0, 2))
    assert shown(measured) == {}, "without a loss nothing is at its least"
    for policies in ([ZLoss(coef=100.0), ExpertBias("proportional", 1e-3)], [AuxLoss(coef=0.0)]):
        twin = net(experts=(6,), top_k=(2,))
        other = Balancer(twin, policies)
        with torch.no_grad():
            twin.blocks[0].gate.weight.mul_(1e-7)
        train_step(twin, other, torch.optim.SGD(twin.parameters(), lr=0.0), make_step(0, 2))
        assert shown(other) == {}, "no balance loss acts"


def test_a_balance_gradient_that_outweighs():
    """Two policies: the one that does is enough; a coefficient a thousandth of it is not."""
    for coef, want in ((100.0, {"outweighs": 2.0}), (1e-3, {})):
        model, balancer, optimizer = two_layers(AuxLoss("sequence", coef), AuxLoss("global_batch", 1e-5))
        with torch.no_grad():
            for block in model.blocks:
                block.gate.weight.mul_(3)
        train_step(model, balancer, optimizer, make_step(0, 2))
        assert shown(balancer) == want


@pytest.mark.parametrize("place", ["scores", "logits"])
def test_biases_that_differ_by_more_than_scores_can(place):
    """On logits there is no such bound."""
    router = Router(dim=4, num_experts=4, top_k=2, gate="sigmoid")
    balancer = Balancer(router, [ExpertBias(rate=0.0, place=place)])
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    assert router.expert_bias is not None
    for largest in (0.4, 0.6):  # 5 on all of them changes no choice
        router.expert_bias.copy_(5 + torch.tensor([largest, 0.0, 0.1, -0.5]))
        balancer.tap(router(x, TokenLayout(1)).weights_TK.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert shown(balancer) == ({"wide_bias": 1.0} if place == "scores" and largest == 0.6 else {})


def test_every_signal_says_what_to_do():
    assert all(one.says and one.do for one in SIGNALS.values())
    model, looking, optimizer = two_layers()
    train_step(model, looking, optimizer, make_step(0))
    assert not any("signals" in key for key in looking.metrics())
