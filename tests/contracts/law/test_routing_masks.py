"""Masks by token id: loads, losses, biases and metrics are those of what was chosen, and p is over what is visible."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from contracts.law._model import (
    MaskedNet,
    assert_close,
    aux,
    loss_of,
    make_step,
    net,
    new_history,
    policy,
    train_step,
    twin,
)
from contracts.law._reference import naive_bias_step, naive_maxvio, reference_step
from equipoise import (
    AuxLoss,
    Balancer,
    ConfigError,
    ExpertBias,
    MoE,
    StateError,
    record_routing,
    replay_routing,
)

DOUBLE: dict[str, Any] = {"dtype": torch.float64, "by_id": True}
POLICIES = {
    "sequence": aux("sequence"),
    "document": aux("document"),
    "unbiased": aux("sequence", counts="unbiased"),
    "unbiased document": aux("document", counts="unbiased"),
    "sequences": aux("sequences", n=3),
    "micro_batch": aux("micro_batch"),
    "grouped": aux("sequence", groups=2, targets=(0.7, 0.3)),
    "global": aux("global_batch", estimator="exact"),
    "prefix": aux("global_batch"),
    "z": {"kind": "z", "coef": 0.5},
}


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("name", POLICIES)
def test_every_loss_is_that_of_the_loops(name, gate):
    step = make_step(3, 2, 2, 5, masked=True, documents=True, dtype=torch.float64)
    model = net(gate=gate, **DOUBLE)
    other, description = twin(model), POLICIES[name]
    balancer = Balancer(model, [policy(description)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    whole = sum(int(micro.mask_BS.sum()) for micro in step if micro.mask_BS is not None)
    weights = [1 / whole] * len(step) if balancer.needs_counting else None  # a counting pass knows the step's tokens
    expected = reference_step(other, step, loss_of, [description], new_history(), weights=weights)
    assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-11)
    metrics = balancer.metrics()
    value = metrics[f"balance/{balancer.schedule.names[0]}/loss"]
    assert value == pytest.approx(expected.values[0], rel=1e-6 if name == "z" else 1e-9)  # its logsumexp is of fp32
    assert [c.tolist() for c in balancer.load()] == expected.counts
    valid = sum(one[0].num_valid for one in expected.seen)
    assert all(valid < sum(counts) < 2 * valid for counts in expected.counts)  # some tokens have one choice
    vio = [naive_maxvio(counts) for counts in expected.counts]
    assert metrics["balance/maxvio_global"] == pytest.approx(sum(vio) / len(vio))


@pytest.mark.parametrize("rule", ["sign", "proportional", "momentum", "rms"])
def test_biases_move_by_what_was_chosen_and_choose_among_what_is_visible(rule):
    model = net(gate="sigmoid", selection_bias=True, **DOUBLE)
    balancer = Balancer(model, [ExpertBias(rule=rule, rate=0.05)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    momentum = [[0.0] * 6, [0.0] * 6]
    for seed in range(3):
        step = make_step(seed, 2, 2, 5, masked=True, dtype=torch.float64)
        before = [block.gate.expert_bias.double().tolist() for block in model.blocks]
        expected = reference_step(twin(model), step, loss_of, [], new_history())  # its loops check the choices
        train_step(model, balancer, optimizer, step)
        for layer, block in enumerate(model.blocks):
            want, momentum[layer] = naive_bias_step(before[layer], expected.counts[layer], rule, 0.05, momentum[layer])
            assert block.gate.expert_bias.tolist() == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_recompute_changes_nothing(mode):
    step = make_step(1, 2, masked=True, dtype=torch.float64)
    found = []
    for way in ("plain", mode):
        model = net(mode=way, **DOUBLE)
        balancer = Balancer(model, [AuxLoss("global_batch", 0.3), AuxLoss("sequence", 0.3)])
        found.append(train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step))
    assert_close(found[1], found[0], 1e-11)


def test_a_compiled_graph_routes_alike():
    step = make_step(1, 2, masked=True, dtype=torch.float64)
    found = []
    for compiled in (False, True):
        model = net(**DOUBLE)
        if compiled:
            model.compile(fullgraph=True, backend="aot_eager")
        balancer = Balancer(model, [AuxLoss("global_batch", 0.3), AuxLoss("sequence", 0.3)])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about its compiler
            found.append(train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), step))
    assert_close(found[1], found[0], 1e-11)


def test_the_quantile_rule_wants_k_choices_of_each_token():
    model = net(selection_bias=True, **DOUBLE)
    with pytest.raises(ConfigError, match="no dropped choice"):
        Balancer(model, [ExpertBias("quantile")])
    layer = MoE(8, 8, 6, 2, batch_first=True, selection_bias=True)
    visible = torch.arange(6) % 2 == torch.arange(4).unsqueeze(1) % 2  # three of six for each id
    layer.gate.enable_mask(visible)
    balancer = Balancer(layer, [ExpertBias("quantile")])
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    ids_BS = torch.randint(4, (4, 64), generator=torch.Generator().manual_seed(0))
    x_BSD = torch.randn(4, 64, 8, generator=torch.Generator().manual_seed(1)) + 1
    vios = []
    for _ in range(12):
        balancer.tap(layer(x_BSD, token_ids_BS=ids_BS).square().mean()).backward()
        optimizer.step()
        vios.append(balancer.metrics()["balance/maxvio_global"])
    assert vios[-1] < 0.2 * vios[0]


def test_a_replay_dispatches_what_was_recorded():
    model, other = (net(seed, **DOUBLE) for seed in (0, 1))  # other weights, the same masks
    (micro,) = make_step(dtype=torch.float64)
    with record_routing(model) as record:
        want = model(micro.x_BSD)
    with replay_routing(model, record):
        assert torch.equal(model(micro.x_BSD), want)
    seen = []
    for block in other.blocks:
        block.gate.register_forward_hook(lambda _router, _args, routing: seen.append(routing))
    with replay_routing(other, record):
        other(micro.x_BSD)
    for routing, (ids_TK,) in zip(seen, record.ids.values(), strict=True):
        none_TK = routing.expert_ids_TK == 6
        assert torch.equal(routing.expert_ids_TK, ids_TK.long())
        assert bool(none_TK.any())
        assert bool((routing.weights_TK[none_TK] == 0).all())
        torch.testing.assert_close(routing.weights_TK.sum(dim=1), torch.ones(10, dtype=torch.float64))


def test_a_mask_is_said_before_the_balancer():
    model = net(**DOUBLE)
    Balancer(model, [AuxLoss()])
    with pytest.raises(StateError, match="make the Balancer again"):
        model.blocks[0].gate.enable_mask(torch.ones(5, 6, dtype=torch.bool))


def test_a_copy_has_the_mask():
    model = net(**DOUBLE)
    (micro,) = make_step(dtype=torch.float64)
    assert torch.equal(copy.deepcopy(model)(micro.x_BSD), model(micro.x_BSD))
    assert isinstance(model, MaskedNet)
