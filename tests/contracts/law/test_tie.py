"""Tie against plain autograd: counts to the last bit, gradients at every parameter, for every gate and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from _named import named
from contracts.law._model import (
    Micro,
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
from contracts.law._reference import naive_maxvio, naive_probs, naive_scores, naive_select, reference_step
from equipoise import AuxLoss, Balancer, ExpertBias, Router
from equipoise.autograd.spec import StatsSpec
from equipoise.autograd.statistics import measure
from equipoise.autograd.token_layout import TokenLayout
from equipoise.functional import GATES, gate_probs, gate_scores, route

EVERY_POLICY = [
    aux("micro_batch"),
    aux("sequence"),
    aux("sequence", counts="unbiased"),
    aux("document"),
    aux("document", counts="unbiased"),
    aux("micro_batch", counts="unbiased"),
    aux("sequences", n=2),
    aux("data_parallel"),
    aux("global_batch"),
    {"kind": "z", "coef": 0.2},
]


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize(
    ("norms", "place"), [(True, "scores"), (False, "scores"), (True, "multiply"), (True, "logits")]
)
def test_every_policy_at_once_equals_autograd(gate, norms, place):
    """B66: f is what was dispatched (bias and groups included) unless the policy asks for the plain top-k."""
    model = net(dtype=torch.float64, experts=(6, 8), top_k=(2, 3), gate=gate, num_groups=2, top_groups=2)
    for block in model.blocks:
        block.gate.enable_selection_bias(place)
        block.gate.expert_bias.copy_(0.3 * torch.randn(block.gate.num_experts))
    other = twin(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    frozen = ExpertBias(rate=0.0, place=place)
    balancer = Balancer(model, named([*(policy(d) for d in EVERY_POLICY), frozen]), gradient_norms=norms)
    step = make_step(1, micro_batches=2, masked=True, documents=True, dtype=torch.float64)
    expected = reference_step(other, step, loss_of, EVERY_POLICY, new_history())
    assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-12)
    assert [counts.tolist() for counts in balancer.load()] == expected.counts
    found = balancer.metrics()
    for i, value in enumerate(expected.values):
        assert found[f"balance/policy_{i}/loss"] == pytest.approx(value, rel=1e-6)
    assert ("balance/policy_0/gradient_ratio" in found) == norms


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [True, False])
def test_router_options_leave_the_push_alone(gate, normalize):
    """The push acts on p = g / sum g, whatever weights the layer then uses (B68, B70, B72)."""
    description = [aux("sequence", coef=1.0)]
    model = net(dtype=torch.float64, gate=gate, normalize=normalize, scale=2.5)
    other = twin(model)
    balancer = Balancer(model, [policy(description[0])])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = make_step(2, dtype=torch.float64)
    expected = reference_step(other, step, loss_of, description, new_history())
    assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-12)


def test_a_mask_as_long_as_the_experts_are_many_is_still_a_mask_of_tokens():
    """B57: T == E turns a wrong broadcast into a silent one."""
    model = net(dtype=torch.float64, experts=(6,), top_k=(2,))
    other = twin(model)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    micro = make_step(3, sequences=1, length=6, dtype=torch.float64)[0]
    micro = micro._replace(mask_BS=torch.tensor([[True, True, False, True, False, False]]))
    expected = reference_step(other, [micro], loss_of, [aux("micro_batch")], new_history())
    assert_close(train_step(model, balancer, optimizer, [micro]), expected.gradients, 1e-12)
    assert [c.tolist() for c in balancer.load()] == expected.counts
    assert int(balancer.load()[0].sum()) == 2 * 3


def test_one_sided_sigmoids_cannot_hack_the_loss():
    """B69: all sigmoids far below zero keep p, the value and the gradient of the same logits shifted."""
    router: Any = Router(2, 4, 1, gate="sigmoid").double()
    balancer = Balancer(router, [AuxLoss("micro_batch", 1.0)])
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    values = []
    for low in (-30.0, -110.0, -300.0):
        router.weight.data = torch.tensor([[low, 1.0], [low, 0.5], [low, -1.0], [low, 0.0]], dtype=torch.float64)
        x = torch.tensor([[1.0, 1.0], [1.0, 0.3]], dtype=torch.float64)
        balancer.tap(router(x).weights_TK.sum()).backward()
        gradient = router.weight.grad[:, 1].clone()
        optimizer.step()
        optimizer.zero_grad()
        values.append((balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"], gradient))
    for value, gradient in values[1:]:
        assert value == pytest.approx(values[0][0], rel=1e-9)
        assert torch.allclose(gradient, values[0][1], rtol=1e-9)
    assert values[0][1].abs().max() > 1e-3


def test_padding_changes_nothing():
    """B56, B62, B65: garbage behind the mask reaches no count, no value and no gradient of the gate."""
    results = []
    for garbage in (0.0, 7.0):
        model = net(dtype=torch.float64)
        balancer = Balancer(model, [policy(d) for d in EVERY_POLICY])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        x, target, _, _ = make_step(4, length=4, dtype=torch.float64)[0]
        pad = garbage * torch.randn(2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        mask = torch.tensor([[True] * 4 + [False] * 3] * 2)
        documents = torch.tensor([[0, 0, 1, 1, 1, 0, 2]] * 2)
        loss = (model(torch.cat([x, pad], 1), mask, documents)[:, :4] - target).square().mean()
        balancer.tap(loss).backward()
        results.append(({n: p.grad.clone() for n, p in model.named_parameters()}, balancer))
        optimizer.step()
    assert_close(results[1][0], results[0][0], 1e-12)
    a, b = (found[1].metrics() for found in results)
    assert a == pytest.approx(b, rel=1e-9)
    assert all(torch.equal(p, q) for p, q in zip(results[0][1].load(), results[1][1].load(), strict=True))


def test_counts_above_2_to_24_are_exact():
    """B34: fp32 counters stop at 16,777,216 and bf16 ones long before."""
    router: Any = Router(1, 2, 1)
    router.weight.data = torch.tensor([[1.0], [-1.0]])
    balancer = Balancer(router, [AuxLoss("micro_batch", 1e-2)])
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    many = 2**24
    balancer.tap(router(torch.ones(1, 1)).weights_TK.mean()).backward()
    assert router.balance_state is not None
    router.balance_state.grad_accumulator.grad.mul_(many)  # as after that many such micro-batches
    for _ in range(3):  # single tokens on top: lost by any counter that rounds
        balancer.tap(router(torch.ones(1, 1)).weights_TK.mean()).backward()
    optimizer.step()
    assert balancer.load()[0].tolist() == [many + 3, 0]
    assert balancer.metrics()["balance/tokens"] == many + 3


def test_one_micro_batch_above_2_to_24_is_exact():
    """The counts of a single micro-batch do not pass through fp32 either."""
    spec = StatsSpec(num_experts=2, top_k=3, gate="softmax")
    counts = torch.tensor([[3 * (2**24 + 1), 3 * 2**25]])
    statistics = measure(
        spec, torch.zeros(1, 2), torch.zeros(1, 3, dtype=torch.int64), counts, TokenLayout()
    ).statistics
    assert statistics[:2].tolist() == counts[0].tolist()
    assert statistics[spec.at("tokens")] == 1  # counted, and not reckoned from the choices


def test_half_precision_tokens_are_counted_exactly():
    """B34: counts and sums do not pass through the model's dtype."""
    model = net(dtype=torch.bfloat16, experts=(4,), top_k=(2,))
    balancer = Balancer(model, [AuxLoss("micro_batch", 1e-2)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = make_step(5, micro_batches=3, sequences=3, length=401, dtype=torch.bfloat16)
    seen = []
    hook = model.blocks[0].gate.register_forward_hook(lambda _m, _a, routing: seen.append(routing.expert_ids_TK))
    train_step(model, balancer, optimizer, step)
    hook.remove()
    expected = torch.bincount(torch.cat(seen).flatten(), minlength=4)
    assert balancer.load()[0].tolist() == expected.tolist()
    assert int(expected.sum()) == 2 * 9 * 401


@pytest.mark.parametrize("gate", GATES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_functions_equal_the_loops(gate, data):
    """Scores, probabilities and group-limited selection against loops, on random shapes."""
    groups = data.draw(st.sampled_from([1, 2, 4]))
    size = data.draw(st.integers(2, 4))
    top_groups = data.draw(st.integers(1, groups))
    top_k = data.draw(st.integers(1, top_groups * size))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    logits = 3 * torch.randn(5, groups * size, generator=generator, dtype=torch.float64)
    bias = torch.randn(groups * size, generator=generator)
    assert torch.allclose(gate_scores(logits, gate), naive_scores(logits, gate), rtol=1e-9)
    assert torch.allclose(gate_probs(logits, gate), naive_probs(logits, gate), rtol=1e-9)
    found = route(logits, top_k, gate=gate, selection_bias_E=bias, num_groups=groups, top_groups=top_groups)
    for row, ids in zip(naive_scores(logits, gate), found.expert_ids_TK, strict=True):
        assert set(ids.tolist()) == naive_select((row + bias.double()).tolist(), top_k, groups, top_groups)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), scope=st.sampled_from(["sequence", "micro_batch", "global_batch"]))
def test_permuting_the_experts_permutes_everything(seed, scope):
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    found = []
    for permute in (False, True):
        model = net(seed % 7, dtype=torch.float64, experts=(6,), top_k=(2,))
        gate, experts = model.blocks[0].gate, model.blocks[0].experts
        if permute:
            for parameter in (gate.weight, experts.gate_up_proj, experts.down_proj):
                parameter.data = parameter.data[order]
        balancer = Balancer(model, named([AuxLoss(scope, 0.5)]))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        grads = train_step(model, balancer, optimizer, make_step(seed % 100, dtype=torch.float64))
        found.append((grads["blocks.0.gate.weight"], balancer.load()[0], balancer.metrics()))
    assert torch.equal(found[0][1][order], found[1][1])
    assert torch.allclose(found[0][0][order], found[1][0], rtol=1e-9, atol=1e-14)
    for key in ("balance/policy_0/loss", "balance/maxvio_global", "balance/policy_0/gradient_ratio"):
        assert found[0][2][key] == pytest.approx(found[1][2][key], rel=1e-9)
    assert found[0][2]["balance/maxvio_global"] == pytest.approx(naive_maxvio(found[0][1].tolist()))


@settings(max_examples=20, deadline=None)
@given(experts=st.integers(2, 9), seed=st.integers(0, 1000), data=st.data())
def test_uniform_probabilities_cost_one_whatever_f(experts, seed, data):
    """B11, B13: f sums to 1 for every K, so that the value in balance is 1 and not K."""
    top_k = data.draw(st.integers(1, experts - 1))
    router: Any = Router(3, experts, top_k).double()
    router.weight.data.zero_()
    balancer = Balancer(router, named([AuxLoss("micro_batch", 1.0), AuxLoss("global_batch", 1.0)]))
    optimizer = torch.optim.SGD(router.parameters(), lr=0.0)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    balancer.tap(router(x).weights_TK.square().sum()).backward()
    optimizer.step()
    for i in (0, 1):
        assert balancer.metrics()[f"balance/policy_{i}/loss"] == pytest.approx(1.0, rel=1e-12)
    assert int(balancer.load()[0].sum()) == 7 * top_k


def test_layers_of_different_width_do_not_cancel():
    """B12: two layers with opposite hot experts are both unbalanced; nothing is pooled. B47: E may differ."""
    model = net(dtype=torch.float64, experts=(4, 9), top_k=(1, 3))
    other = twin(model)
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step: list[Micro] = make_step(6, micro_batches=2, dtype=torch.float64)
    expected = reference_step(other, step, loss_of, [aux("global_batch")], new_history())
    assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-12)
    assert [c.tolist() for c in balancer.load()] == expected.counts
    found = balancer.metrics()
    for layer, counts in enumerate(expected.counts):
        assert found[f"balance/layer_{layer:02d}/maxvio_global"] == pytest.approx(naive_maxvio(counts))
    assert found["balance/maxvio_global"] == pytest.approx(sum(map(naive_maxvio, expected.counts)) / 2)
