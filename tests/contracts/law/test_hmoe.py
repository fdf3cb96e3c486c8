"""HMoE's two losses (arXiv 2408.10681): loads counted by the widths of a layer's experts, and the router's entropy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from contracts.law._model import assert_close, aux, loss_of, make_step, net, new_history, policy, train_step, twin
from contracts.law._reference import naive_maxvio, reference_step
from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    EntropyLoss,
    MoE,
    Ratio,
    Switch,
    Target,
    record_routing,
    replay_routing,
)
from equipoise.functional import balance_loss, entropy_loss, gate_probs, load_fractions
from equipoise.functional.load_view import LoadView, load_view
from equipoise.policies import Schedule, policies_from

DOUBLE: dict[str, Any] = {"dtype": torch.float64}
WIDTHS = [2, 4, 6, 8, 12, 16]
SCOPES = ("sequence", "document", "micro_batch", "data_parallel", "global_batch")


def one_layer(**more: Any) -> Any:
    return net(experts=(6,), top_k=(2,), widths=[WIDTHS], gate="sigmoid", **more, **DOUBLE)


@pytest.mark.parametrize("more", [{}, {"groups": 3, "targets": [0.5, 0.3, 0.2]}], ids=["alone", "groups and targets"])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_widths_of_the_layer_are_the_costs(scope, more):
    """Against loops that are told the widths."""
    model, step = one_layer(), make_step(1, 3, 3, 4, masked=True, documents=True, **DOUBLE)
    balancer = Balancer(model, [policy(aux(scope, costs="width", **more))])
    expected = reference_step(twin(model), step, loss_of, [aux(scope, costs=WIDTHS, **more)], new_history())
    plain = reference_step(twin(model), step, loss_of, [aux(scope, **more)], new_history())
    assert any(not torch.allclose(expected.gradients[n], plain.gradients[n], rtol=1e-3) for n in plain.gradients)
    got = train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step)
    assert_close(got, expected.gradients, 1e-11)
    (name,) = balancer.schedule.names
    assert balancer.metrics()[f"balance/{name}/loss"] == pytest.approx(expected.values[0], rel=1e-9)


def test_each_layer_has_its_own():
    widths = [WIDTHS, [8] * 6, [8, 24, 16, 8, 8, 32]]
    model, step = net(experts=(6,) * 3, top_k=(2,) * 3, widths=widths, **DOUBLE), make_step(0, 1, 4, 4, **DOUBLE)
    seen: list[Any] = []
    for block in model.blocks:
        block.gate.register_forward_hook(lambda _m, _i, out: seen.append(out))
    balancer = Balancer(model, policies_from(["parameters", "global:width"]))
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step)
    values = [
        balance_loss(gate_probs(out.logits_TE), out.expert_ids_TK, view=LoadView(costs=tuple(map(float, of_layer))))
        for out, of_layer in zip(seen, widths, strict=True)
    ]
    assert len({round(float(value.detach()), 9) for value in values}) == 3
    mean = float(torch.stack(values).mean().detach())
    found = balancer.metrics()
    assert found["balance/micro/loss"] == pytest.approx(mean) == found["balance/global/loss"]


def test_it_is_the_published_formula_over_k_and_the_mean_width():
    """L = E sum_i M_i P_i with M_i = mean_t 1[i active] h_i."""
    torch.manual_seed(0)
    probs, widths = torch.randn(50, 6, dtype=torch.float64).softmax(dim=1), torch.tensor(WIDTHS, dtype=torch.float64)
    ids = probs.topk(2).indices
    active_TE = torch.zeros(50, 6, dtype=torch.float64).scatter_(1, ids, 1.0)
    published = 6 * ((active_TE.mean(dim=0) * widths) * probs.mean(dim=0)).sum()
    got = balance_loss(probs, ids, view=load_view(costs=WIDTHS))
    torch.testing.assert_close(got, published / (2 * widths.mean()))


@pytest.mark.parametrize("widths", [WIDTHS, [8] * 6, [1, 1, 1, 1, 1, 100]])
def test_in_balance_it_is_one(widths):
    ids = torch.arange(12).view(6, 2) % 6
    uniform = torch.full((6, 6), 1 / 6, dtype=torch.float64)
    assert float(balance_loss(uniform, ids, view=load_view(costs=widths))) == pytest.approx(1)


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_with_one_width_it_is_the_plain_loss_to_the_last_bit(scope):
    gradients = []
    for name in (f"{scope}@0.3", f"{scope}:width@0.3"):
        model = net(widths=[[8] * 6] * 2)
        balancer = Balancer(model, policies_from(name))
        step = make_step(0, 3, 3, 4)
        gradients.append(train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step))
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0])


def taught(name: str) -> dict[str, float]:
    """The metrics after a router was taught by one policy alone; its experts are frozen."""
    torch.manual_seed(0)
    layer = MoE(16, [8, 16, 24, 32, 40, 48, 56, 64], 8, 2, batch_first=True)
    layer.experts.requires_grad_(False)
    with torch.no_grad():
        layer.gate.weight[4:] += 0.3  # wide experts begin with more than their share
    x = torch.randn(4, 64, 16) + 0.5
    balancer = Balancer(layer, policies_from(name))
    optimizer = torch.optim.Adam(layer.gate.parameters(), lr=0.02)
    for _ in range(60):
        balancer.tap(0.0 * layer(x).sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return balancer.metrics()


def test_the_penalty_moves_tokens_to_narrow_experts():
    plain, penalty = taught("micro@0.1"), taught("parameters@0.1")
    assert plain["balance/maxvio_global"] < 0.25, "the plain loss makes tokens even"
    assert plain["balance/active_width"] == pytest.approx(2 * 36, rel=0.05), "and so the width the mean one"
    assert penalty["balance/maxvio_width"] < 0.35 < plain["balance/maxvio_width"], "the penalty makes the work even"
    assert penalty["balance/active_width"] < 0.8 * plain["balance/active_width"]


@pytest.mark.parametrize("top_p", [None, 0.5])
def test_metrics_are_those_of_loops(top_p):
    model = net(experts=(6,), top_k=(3,), widths=[WIDTHS], top_p=top_p, **DOUBLE)
    step, counts, tokens = make_step(0, 2, 3, 4, masked=True, **DOUBLE), [0] * 6, 0
    seen: list[Any] = []
    model.blocks[0].gate.register_forward_hook(lambda _m, _i, out: seen.append(out.expert_ids_TK))
    balancer = Balancer(model, [AuxLoss()])
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step)
    for micro, ids_TK in zip(step, seen, strict=True):
        assert micro.mask_BS is not None
        for valid, ids in zip(micro.mask_BS.flatten().tolist(), ids_TK.tolist(), strict=True):
            tokens += valid
            for e in ids if valid else []:
                if e < 6:
                    counts[e] += 1
    found = balancer.metrics()
    assert found["balance/active_width"] == pytest.approx(
        sum(c * h for c, h in zip(counts, WIDTHS, strict=True)) / tokens
    )
    assert found["balance/maxvio_width"] == pytest.approx(
        naive_maxvio([c * h for c, h in zip(counts, WIDTHS, strict=True)])
    )
    assert found["balance/maxvio_global"] == pytest.approx(naive_maxvio(counts))
    assert (found.get("balance/experts_per_token") is None) == (top_p is None)
    if top_p is not None:
        assert found["balance/experts_per_token"] == pytest.approx(sum(counts) / tokens)
        assert sum(counts) < 3 * tokens


def test_f_is_the_share_of_the_choices_that_are_made():
    """Where tokens use fewer than K experts too it sums to 1, so that balance has the value 1 at any strength."""
    ids = torch.tensor([[0, 3], [1, 3], [2, 3], [0, 1], [2, 3]])  # of 3 experts
    counts = torch.tensor([2, 2, 2])
    assert load_fractions(counts).sum() == 1
    uniform = torch.full((5, 3), 1 / 3, dtype=torch.float64)
    assert float(balance_loss(uniform, ids)) == pytest.approx(1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt_softplus"])
def test_the_entropy_s_gradient_is_that_of_its_formula(gate, masked):
    model, step = net(gate=gate, **DOUBLE), make_step(0, 1, 3, 4, masked=masked, **DOUBLE)
    logits: list[Any] = []
    hooks = [b.gate.register_forward_hook(lambda _m, _i, out: logits.append(out.logits_TE)) for b in model.blocks]
    language, mask_BS = loss_of(model, step[0]), step[0].mask_BS
    values = [entropy_loss(z, gate, None if mask_BS is None else mask_BS.flatten()) for z in logits]
    expected = torch.autograd.grad(language + 0.5 * sum(values), list(model.parameters()))
    for hook in hooks:
        hook.remove()
    balancer = Balancer(model, [EntropyLoss(0.5)])
    got = train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step)
    assert_close(got, dict(zip(got, expected, strict=True)), 1e-12)
    assert balancer.metrics()["balance/entropy/loss"] == pytest.approx(float(torch.stack(values).mean().detach()))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_a_router_that_is_sure_has_no_entropy_and_no_gradient(gate):
    """p ln p is 0 where p is 0 in its own dtype."""
    layer = MoE(4, 8, 3, 1, gate=gate, batch_first=True)
    with torch.no_grad():
        layer.gate.weight.zero_()[0] = 1e3
        if gate == "sigmoid":
            layer.gate.weight[1:] = -1e3
    balancer = Balancer(layer, [EntropyLoss(1.0)])
    balancer.tap(0.0 * layer(torch.ones(2, 3, 4)).sum()).backward()
    assert layer.gate.weight.grad is not None and not layer.gate.weight.grad.any()
    balancer.step()
    assert balancer.metrics()["balance/entropy/loss"] == 0


def test_the_entropy_loss_makes_top_p_take_fewer():
    used = []
    for coef in (0.0, 1.0):
        torch.manual_seed(0)
        layer = MoE(16, 8, 8, 8, top_p=0.6, batch_first=True)
        balancer = Balancer(layer, [EntropyLoss(coef)])
        optimizer = torch.optim.Adam(layer.gate.parameters(), lr=0.02)
        for _ in range(20):
            balancer.tap(0.0 * layer(torch.randn(2, 32, 16)).sum()).backward()
            optimizer.step()
            optimizer.zero_grad()
        used.append(balancer.metrics()["balance/experts_per_token"])
    assert used[1] < 0.75 * used[0]


def test_it_switches_has_a_name_and_beside_others_its_own_numbers():
    schedule = Schedule([AuxLoss(), Switch(at=5, to=EntropyLoss(0.1), first=EntropyLoss(lambda step: 0.01 * step))])
    assert schedule.names == ("global", "entropy", "entropy_2")
    assert [one.term for one in schedule] == [0, 1, 2]
    assert not Schedule([EntropyLoss()]).balances_load, "it measures no load"
    model = net()
    balancer = Balancer(model, [EntropyLoss(), AuxLoss("sequence"), EntropyLoss(0.1)])
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step(0, 2, 3, 4))
    found = balancer.metrics()
    assert 0.5 < found["balance/entropy/loss"] == found["balance/entropy_2/loss"] < math.log(6)
    assert found["balance/sequence/loss"] != found["balance/entropy/loss"]
    ratio = found["balance/entropy_2/gradient_ratio"] / found["balance/entropy/gradient_ratio"]
    assert ratio == pytest.approx(0.1 / 0.03, rel=1e-4)
    assert "EntropyLoss, coef 0.03; AuxLoss sequence" in " ".join(balancer.describe().split())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AuxLoss(costs="widths"), 'costs=\\[1, 1, 2\\], or "width"'),
        (lambda: EntropyLoss(Ratio(0.1)), "an entropy loss with a number or a function of the step"),
        (lambda: EntropyLoss(-0.1), "a coefficient >= 0"),
        (lambda: policies_from("entropy:width"), "a detail of entropy"),
        (lambda: policies_from("loss-free:width"), "width"),
    ],
)
def test_what_has_no_meaning_is_refused(make, words):
    with pytest.raises(ConfigError, match=words):
        make()


def test_names_say_what_policies_are():
    assert policies_from("parameters") == [AuxLoss("micro_batch", 0.1, costs="width")]
    assert policies_from("parameters@0.3+entropy@0.05") == [
        AuxLoss("micro_batch", 0.3, costs="width"),
        EntropyLoss(0.05),
    ]
    assert policies_from("global:width:target@0.2")[0] == AuxLoss(coef=Target(0.2), costs="width")
    assert "costs by width" in Balancer(net(widths=[WIDTHS] * 2), policies_from("parameters")).describe()


def test_a_router_behind_which_widths_are_said_otherwise():
    """`MoE` says them; who builds a router and experts apart says them to the router."""
    layer = MoE(8, 8, 4, 2)
    layer.gate.expert_widths = (1, 2, 3)
    with pytest.raises(ConfigError, match="one for each of 4 experts"):
        Balancer(layer, policies_from("parameters"))


def test_a_recorded_routing_is_replayed_with_the_experts_that_each_token_had():
    torch.manual_seed(0)
    layer, x = MoE(16, WIDTHS, 6, 4, top_p=0.5, batch_first=True).double(), torch.randn(2, 20, 16, dtype=torch.float64)
    with record_routing(layer) as recorded:
        expected = layer(x)
    ids_TK = layer.gate(x.flatten(0, 1)).expert_ids_TK
    assert 0 < int((ids_TK == 6).sum()) < ids_TK.numel()
    balancer = Balancer(layer, [])
    with replay_routing(layer, recorded):
        assert torch.equal(layer(x), expected)
        with torch.no_grad():
            layer.gate.weight.copy_(layer.gate.weight.flip(0))  # it would choose others now
    with replay_routing(layer, recorded):
        y = layer(x)
        balancer.tap(y.sum()).backward()
    balancer.step()
    assert [c.tolist() for c in balancer.load()] == [torch.bincount(ids_TK.flatten(), minlength=7)[:6].tolist()]
    live_TK = layer.gate(x.flatten(0, 1)).expert_ids_TK.tolist()
    kept = [[e for e in row if e < 6] for row in ids_TK.tolist()]
    missed = sum(e not in live for row, live in zip(kept, live_TK, strict=True) for e in row)
    assert balancer.metrics()["balance/replay_gap"] == pytest.approx(missed / sum(map(len, kept)))
