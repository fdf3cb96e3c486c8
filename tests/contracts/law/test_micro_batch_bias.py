"""The named control ``ExpertBias(scope="micro_batch")``: the rule asked of each micro-batch, and averaged, by loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.law._external import Block, Chain, D, Gate
from contracts.law._micro_bias_cases import RATE, counts_of
from contracts.law._model import Micro, cut, loss_of, make_step, net, setup, train_step
from contracts.law._reference import naive_bias_step, naive_micro_batch_bias_step
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias

pytestmark = pytest.mark.xdist_group("ranks")
RULES = ("sign", "proportional", "rms")


def biases(model: Any) -> list[Tensor]:
    return [block.gate.expert_bias.clone() for block in model.blocks]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rule", RULES)
def test_the_rule_is_averaged_over_micro_batches_and_ranks(ranks, rule, size):
    """Uneven micro-batches with padding; one of nothing but padding is none, and every other one weighs the same."""
    told = ranks.run("contracts.law._micro_bias_cases:trained", rule, size=size)
    before = [[0.0] * 5, [0.0] * 6]
    for steps in zip(*told, strict=True):
        assert all(one["bias"] == steps[0]["bias"] for one in steps), "the same on every rank"
        for layer, bias in enumerate(before):
            parts = [counts for one in steps for counts in one["counts"][layer]]
            assert len(parts) == 3 * size and [sum(counts) for counts in parts].count(0) == size - 1
            want = naive_micro_batch_bias_step(bias, parts, rule, RATE)
            assert steps[0]["bias"][layer] == pytest.approx(want, abs=1e-7)
            whole = [sum(of_expert) for of_expert in zip(*parts, strict=True)]
            other, _ = naive_bias_step(bias, whole, rule, RATE, [])
            assert steps[0]["bias"][layer] != pytest.approx(other, abs=1e-5), "that of the whole step would do as well"
        before = steps[0]["bias"]


@pytest.mark.parametrize("rule", RULES)
def test_one_micro_batch_is_the_whole_step(rule):
    found = []
    for scope in ("micro_batch", "global_batch"):
        model, balancer, optimizer = setup(ExpertBias(rule, RATE, scope=scope))
        train_step(model, balancer, optimizer, make_step(0, masked=True))
        found.append(biases(model)[0])
    assert torch.equal(*found) and found[0].any()


@pytest.mark.parametrize("masked", [False, True])
def test_micro_batches_in_one_pass_are_as_those_that_ran_alone(masked):
    """Three of 2 sequences: alone, as one pass, and as passes of 4 and 2; and a last group that is smaller."""
    step = make_step(0, 3, masked=masked)
    (whole,) = cut(step, 1)

    def moved(size: int, passes: tuple[int, ...]) -> Tensor:
        model = net(experts=(5,), top_k=(2,), gate="sigmoid")
        policy = ExpertBias("proportional", RATE, scope="micro_batch")
        balancer = Balancer(model, [policy], sequences_per_micro_batch=size)
        train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), _split(whole, passes))
        return biases(model)[0]

    alone = moved(2, (2, 2, 2))
    assert alone.any()
    assert torch.equal(alone, moved(2, (6,))) and torch.equal(alone, moved(2, (4, 2)))
    want = naive_micro_batch_bias_step([0.0] * 5, _without_bias(step, (4, 2)), "proportional", RATE)
    assert moved(4, (6,)).tolist() == pytest.approx(want, abs=1e-7)


def _split(whole: Micro, sizes: tuple[int, ...]) -> list[Micro]:
    fields = [[None] * len(sizes) if field is None else field.split(sizes) for field in whole]
    return [Micro(*parts) for parts in zip(*fields, strict=True)]  # type: ignore[arg-type]


def _without_bias(step: list[Micro], sizes: tuple[int, ...]) -> list[list[int]]:
    """Counts of each group of sequences at the first router of the model as it was made."""
    model, found = net(experts=(5,), top_k=(2,), gate="sigmoid"), []
    model.blocks[0].gate.register_forward_hook(lambda _m, args, out: found.append(counts_of(out, args[1].token_mask_T)))
    for part in _split(cut(step, 1)[0], sizes):
        loss_of(model, part)
    return found


@pytest.mark.parametrize("mode", ["reentrant", "non_reentrant", "selective"])
def test_a_recompute_counts_once_and_evaluation_not_at_all(mode):
    found = []
    for how in ("plain", mode):
        model = net(mode=how, gate="sigmoid")
        balancer = Balancer(model, [ExpertBias("rms", RATE, scope="micro_batch"), AuxLoss("sequence", 0.3)])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def evaluated(_number: int, model: Any = model, how: str = how) -> None:
            if how != "plain":
                model.eval()
                loss_of(model, make_step(9)[0])
                model.train()

        train_step(model, balancer, optimizer, make_step(1, 2, masked=True), between=evaluated)
        found.append(biases(model))
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*found, strict=True))


def test_what_is_given_up_leaves_nothing():
    """A micro-batch that was discarded is in no mean, and neither are those of the step before."""
    found = []
    for disturbed in (False, True):
        model, balancer, optimizer = setup(ExpertBias("proportional", RATE, scope="micro_batch"))
        train_step(model, balancer, optimizer, make_step(0, 2))
        if disturbed:
            balancer.tap(loss_of(model, make_step(7)[0])).backward()
            optimizer.zero_grad()
            balancer.discard()
        train_step(model, balancer, optimizer, make_step(1, 2))
        found.append(biases(model)[0])
    assert torch.equal(*found)


def test_beside_a_bias_of_the_step_and_unbiased_counts_each_finds_its_own():
    """Two rules of micro-batches and one of the step, behind unbiased counts: the layout of the statistics."""
    policies = [
        ExpertBias("sign", RATE, scope="micro_batch"),
        ExpertBias("rms", RATE),
        ExpertBias("proportional", RATE, scope="micro_batch"),
        AuxLoss("sequence", 0.3, counts="unbiased"),
    ]
    model, balancer, optimizer = setup(*policies)
    step = make_step(0, 3)
    parts = _without_bias(step, (2, 2, 2))
    whole = [sum(of_expert) for of_expert in zip(*parts, strict=True)]
    train_step(model, balancer, optimizer, step)
    bias = naive_micro_batch_bias_step([0.0] * 5, parts, "sign", RATE)
    bias, _ = naive_bias_step(bias, whole, "rms", RATE, [])
    bias = naive_micro_batch_bias_step(bias, parts, "proportional", RATE)
    assert biases(model)[0].tolist() == pytest.approx(bias, abs=1e-7)
    assert balancer.load()[0].tolist() == whole


def test_at_another_library_s_router():
    torch.manual_seed(0)
    model, batches = Chain(Block(Gate(gate="sigmoid"))).double().train(), torch.randn(3, 2, 8, D, dtype=torch.float64)
    policy = ExpertBias("proportional", RATE, scope="micro_batch")
    balancer = Balancer(model, [policy], example={"x": batches[0]})
    (router,) = balancer.routers.values()
    weight: Any = dict(model.named_parameters())["blocks.0.router.linear.weight"]
    parts = []
    for x in batches:
        ids = (x @ weight.T).topk(2, dim=-1).indices
        parts.append(torch.bincount(ids.flatten(), minlength=4).tolist())
        (balancer.tap(model(x).square().mean()) / 3).backward()
    torch.optim.SGD(model.parameters(), lr=0.0).step()
    want = naive_micro_batch_bias_step([0.0] * 4, parts, "proportional", RATE)
    assert router.expert_bias is not None
    assert router.expert_bias.tolist() == pytest.approx(want, abs=1e-7)


def test_the_rule_with_a_memory_is_refused():
    with pytest.raises(ConfigError, match="rule without memory") as caught:
        ExpertBias("momentum", scope="micro_batch")
    assert "'proportional'" in caught.value.do


def test_describe_names_the_control():
    _, balancer, _ = setup(ExpertBias(scope="micro_batch"))
    assert "scope micro_batch" in " ".join(balancer.describe().split())
