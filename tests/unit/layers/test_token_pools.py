"""Pools over ranks and micro-batches are the pool of the whole batch; thresholds move once a step, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equipoise import ConfigError, ExpertChoiceMoE, InputError, StateError, TokenPools
from equipoise.functional import tokens_per_expert
from unit.layers.expert_choice_cases import DECAY, RECOMPUTE, STEPS, batch, gradients, model_of, train

pytestmark = pytest.mark.xdist_group("ranks")
CASES = "unit.layers.expert_choice_cases"


def same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        tolerance = 1e-6 if "thresholds" in name else 1e-10  # the former are fp32
        torch.testing.assert_close(
            got[name], wanted[name], rtol=tolerance, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_pools_that_are_removed_twice_leave_the_next_alone():
    torch.manual_seed(0)
    model = ExpertChoiceMoE(dim=8, hidden=16, num_experts=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = TokenPools(model, optimizer)
    first.remove()
    second = TokenPools(model, optimizer)
    first.remove()
    (model(torch.randn(2, 8, 8)).sum() + second.loss()).backward()
    optimizer.step()
    assert torch.isfinite(model.gate.thresholds).all()


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("micro_batches", [1, 2, 8])
def test_micro_batches_share_the_pool_of_the_step(micro_batches, recompute):
    same(train("global_batch", recompute, micro_batches), train("global_batch", "none", 1))


def test_a_micro_batch_may_be_smaller_than_a_pool_has_to_be():
    """5 tokens of which 4 experts would take a third each; of all 40 they take 2."""
    same(train("global_batch", "none", 8, capacity=0.25), train("global_batch", "none", 1, capacity=0.25))


@pytest.mark.parametrize(
    ("size", "micro_batches", "recompute"),
    [(2, 1, "none"), (2, 2, "reentrant"), (2, 2, "non_reentrant"), (4, 1, "reentrant")],
)
def test_ranks_share_the_pool_of_the_step(ranks, size, micro_batches, recompute):
    wanted = train("global_batch", "none", 1)
    for found in ranks.run(f"{CASES}:train", "global_batch", recompute, micro_batches, size=size):
        same(found, wanted)


@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_pools_inside_a_micro_batch_do_not_depend_on_the_cut(ranks, recompute):
    """A pool of one sample or two: whole ones, however the batch is cut. Thresholds are of the whole step."""
    for scope in ("sample", 2):
        wanted = train(scope, "none", 1, capacity=1.6)
        for found in ranks.run(f"{CASES}:train", scope, recompute, 2, 1.6, size=2):
            same(found, wanted)


def test_a_micro_batch_s_own_pool_is_another():
    """The control: without a shared pool the law does not hold."""
    wanted, got = train("micro_batch", "none", 1), train("micro_batch", "none", 4)
    assert (got["grad first.weight"] - wanted["grad first.weight"]).abs().max() > 1e-4


@pytest.mark.parametrize("recompute", RECOMPUTE)
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_thresholds_are_the_moving_average_of_the_step_s_kth_largest(scope, recompute):
    """Against a loop in Python over what the predictor says of the tokens, before each step's weights move."""
    model = model_of(scope, recompute)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer, decay=DECAY)
    wanted: list[list[float]] = [[], []]
    for step in range(STEPS):
        seen: list[list[torch.Tensor]] = [[], []]
        hooks = [
            layer.gate.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].detach().flatten(0, 1)))
            for layer, kept in zip(model.layers, seen, strict=True)
        ]
        loss = (model(batch(step)) - batch(step)).square().mean() + pools.loss()
        for at, layer in enumerate(model.layers):
            scores_TE = layer.gate.predictor(seen[at][0]).sigmoid()
            count = tokens_per_expert(*scores_TE.shape, 1.0)
            last = [sorted(scores_TE[:, e].tolist())[-count] for e in range(4)]
            before = wanted[at] or last
            wanted[at] = [DECAY * old + (1 - DECAY) * new for old, new in zip(before, last, strict=True)]
        loss.backward()
        for hook in hooks:
            hook.remove()
        optimizer.step()
        optimizer.zero_grad()
        for at, layer in enumerate(model.layers):
            assert layer.gate.thresholds.tolist() == pytest.approx(wanted[at], rel=2e-7)


def test_evaluation_moves_nothing():
    model = model_of("global_batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer)
    (model(batch(0)).square().mean() + pools.loss()).backward()
    optimizer.step()
    before = model.layers[0].gate.thresholds.clone()
    model.eval()
    with torch.no_grad():
        model(batch(1))
    with pytest.raises(StateError, match="in training mode before each loss"):
        pools.loss()
    model.train()
    (model(batch(1)).square().mean() + pools.loss()).backward()
    assert torch.equal(model.layers[0].gate.thresholds, before), "only the optimizer's step moves them"


def test_the_predictor_learns_from_its_loss_alone_and_reaches_nothing_else():
    model = model_of("micro_batch")
    pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
    y_BSD = model(batch(0))
    y_BSD.square().mean().backward()
    predictors = {p for layer in model.layers for p in layer.gate.predictor.parameters()}
    assert all((p.grad is None) is (p in predictors) for p in model.parameters())
    model.zero_grad()
    pools.loss().backward()
    for p in model.parameters():
        assert (p.grad is not None and bool(p.grad.any())) is (p in predictors)


def test_a_predictor_that_is_trained_says_what_experts_take():
    """Tokens of which one coordinate decides who takes them: after some steps inference takes nearly the same."""
    torch.manual_seed(0)
    layer = ExpertChoiceMoE(8, 4, num_experts=4)
    nn.init.normal_(layer.gate.weight)
    layer.gate.weight.requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    pools = TokenPools(layer, optimizer)
    for _ in range(150):
        layer(torch.randn(32, 16, 8))
        pools.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
    x_BSD = torch.randn(32, 16, 8)
    taken = [
        set(zip(*(ids.tolist() for ids in layer.gate(x_BSD)[:2]), strict=True))
        for layer in (layer.train(), layer.eval())
    ]
    assert len(taken[0] & taken[1]) > 0.85 * len(taken[0])
    assert len(taken[1]) == pytest.approx(len(taken[0]), rel=0.15), "thresholds keep the capacity"


def test_a_backward_after_the_loop_recomputes_each_micro_batch_s_own_choice():
    found = []
    for recompute in ("none", "reentrant"):
        model = model_of("global_batch", recompute)
        pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
        total = 0.0
        for x_BSD in pools.micro_batches(batch(0).chunk(4), model):
            total = total + (model(x_BSD.clone().requires_grad_()) - x_BSD).square().mean() + pools.loss()
        total.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    same(*found)


def test_what_only_looks_leaves_random_numbers_as_they_are():
    model = model_of("global_batch")
    pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
    torch.manual_seed(7)
    wanted = torch.rand(1)
    torch.manual_seed(7)
    for at, _ in enumerate(pools.micro_batches(batch(0).chunk(2), lambda x: model(x + 0 * torch.rand(1)))):
        assert at or torch.equal(torch.rand(1), wanted)


def step_of(pools, model, *, learn=True):
    model(batch(0)).square().mean().backward()
    if learn:
        pools.loss().backward()


def test_a_second_micro_batch_with_a_pool_of_its_own_is_refused():
    model = model_of("global_batch")
    pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
    step_of(pools, model)
    with pytest.raises(StateError, match="a second micro-batch with a pool of its own"):
        step_of(pools, model)
    pools.discard()
    step_of(pools, model)


def test_a_step_that_taught_the_predictor_nothing_is_refused():
    model = model_of("micro_batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer)
    step_of(pools, model, learn=False)
    with pytest.raises(StateError, match="in the loss of every step"):
        optimizer.step()
    pools.remove()
    optimizer.step()


def test_a_loss_without_a_forward_and_a_second_one_are_refused():
    model = model_of("micro_batch")
    pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(StateError, match="before each loss"):
        pools.loss()
    step_of(pools, model)
    with pytest.raises(StateError, match="before each loss"):
        pools.loss()


def test_a_shared_pool_in_evaluation_mode_is_refused():
    model = model_of("global_batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer)
    for _ in range(2):  # without thresholds and with them
        with pytest.raises(StateError, match=r"in training mode(.|\n)*got: layers\.0\.gate in evaluation mode"):
            next(pools.micro_batches(batch(0).chunk(2), model.eval()))
        step_of(pools, model.train())
        optimizer.step()
        optimizer.zero_grad()


def test_other_tokens_than_experts_chose_from_are_refused():
    model = model_of("global_batch")
    pools = TokenPools(model, torch.optim.SGD(model.parameters(), lr=0.1))
    x_BSD = next(inside := pools.micro_batches(batch(0).chunk(2), model))
    with pytest.raises(InputError, match="the 20 tokens of micro-batch 0"):
        model(x_BSD[:1])
    inside.close()


def test_what_cannot_be_a_pool_is_refused():
    with pytest.raises(ConfigError, match="layers whose experts choose"):
        TokenPools(nn.Linear(2, 2), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
    model = model_of("global_batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for other in (torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1), None):
        with pytest.raises(ConfigError, match="the optimizer that trains this model"):
            TokenPools(model, other)
    with pytest.raises(ConfigError, match="a decay in"):
        TokenPools(model, optimizer, decay=1.0)
    TokenPools(model, optimizer)
    with pytest.raises(StateError, match="one TokenPools for a model"):
        TokenPools(model, optimizer)


def test_ranks_that_nobody_has_joined_are_refused(ranks):
    for said in ranks.run(f"{CASES}:alone", "global_batch", size=2):
        assert "joins the pools of all ranks" in said
    assert ranks.run(f"{CASES}:alone", "micro_batch", size=2) == ["nothing"] * 2


def test_layers_without_a_predictor_need_no_loss():
    model = model_of("sample")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pools = TokenPools(model, optimizer)
    before = model.layers[0].gate.weight.detach().clone()
    assert pools.loss() == 0
    model(batch(0)).square().mean().backward()  # and nobody misses it
    optimizer.step()
    assert not torch.equal(model.layers[0].gate.weight, before)


@pytest.mark.parametrize("recompute", ["none", "reentrant"])
def test_micro_batches_of_unlike_sizes_share_the_pool_too(recompute):
    same(gradients(recompute, [[5, 0, 1, 2]]), gradients("none", [[8]]))


@pytest.mark.parametrize("parts", [[[5], [3]], [[8], [0]], [[3, 2], [0, 3]]], ids=str)
def test_ranks_of_unlike_sizes_share_the_pool_too(ranks, parts):
    wanted = gradients("none", [[8]])
    for found in ranks.run(f"{CASES}:gradients", "reentrant", parts, size=2):
        same(found, wanted)
