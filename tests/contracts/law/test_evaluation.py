"""balancer.evaluation(): what routers see in evaluation, beside a step that learns nothing of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contracts.law._model import Micro, gradients, loss_of, make_step, net
from equipoise import AuxLoss, Balancer, ExpertBias, InputError, StateError, ZLoss

LOSSES = [AuxLoss("global_batch", 0.3), AuxLoss("document", 0.3), ZLoss(0.1), ExpertBias(rate=0.01)]


def choices(model: Any, batches: list[Micro]) -> list[list[list[int]]]:
    """Of each layer, the experts of all tokens that are no padding, read off a model in evaluation by a hook."""
    seen: list[list] = [[] for _ in model.blocks]
    hooks = [
        block.gate.register_forward_hook(lambda _m, _a, out, seen=seen, i=i: seen[i].append(out.expert_ids_TK))
        for i, block in enumerate(model.blocks)
    ]
    model.eval()
    with torch.no_grad():
        for one in batches:
            model(one.x_BSD, one.mask_BS, one.documents_BS)
    for hook in hooks:
        hook.remove()
    valid_T = torch.cat([one.mask_BS.flatten() for one in batches])  # type: ignore[union-attr]
    return [torch.cat(of_layer)[valid_T].tolist() for of_layer in seen]


def maxvio(rows: list[list[int]], experts: int) -> float:
    counts = [sum(row.count(e) for row in rows) for e in range(experts)]
    return max(counts) * experts / sum(counts) - 1


@pytest.mark.parametrize("policies", [[], LOSSES])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_it_counts_the_tokens_of_evaluation(policies, context):
    model = net(gate="sigmoid")
    balancer = Balancer(model, policies)
    batches = make_step(seed=5, micro_batches=3, masked=True, documents=True)
    expected = choices(model, batches)
    with balancer.evaluation() as found, context():
        for one in batches:
            model(one.x_BSD, one.mask_BS, one.documents_BS)
        assert found == {}
    assert found["balance/tokens"] == len(expected[0])
    for i, rows in enumerate(expected):
        assert found[f"balance/layer_{i:02d}/maxvio_global"] == pytest.approx(maxvio(rows, 6), rel=1e-12)
    assert not any(word in key for key in found for word in ("policy", "steps", "flips"))
    model(batches[0].x_BSD)  # outside
    with balancer.evaluation() as again:
        for one in batches:
            model(one.x_BSD, one.mask_BS, one.documents_BS)
    assert again == found


@pytest.mark.parametrize("policies", [[], LOSSES])
@pytest.mark.parametrize("mode", ["plain", "reentrant"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_step_under_way_learns_nothing_of_it(policies, mode, fails):
    results = []
    for evaluates in (False, True):
        model = net(mode=mode, gate="sigmoid")
        balancer, optimizer = Balancer(model, policies), torch.optim.SGD(model.parameters(), lr=0.1)
        for micro in make_step(micro_batches=2, masked=True, documents=True):
            loss = balancer.tap(loss_of(model, micro))
            (loss / 2).backward()
            if evaluates:
                other = make_step(seed=9, masked=True, documents=True)[0]
                model.eval()
                model.mode = "plain"  # who checkpoints, does so in training
                try:
                    with balancer.evaluation():
                        balancer.tap(loss_of(model, other))
                        if fails:
                            raise KeyError("a metric that failed")
                except KeyError:
                    pass
                model.train()
                model.mode = mode
        found = gradients(model)
        optimizer.step()
        biases = [block.gate.expert_bias for block in model.blocks]
        results.append((found, balancer.load(), biases, balancer.metrics(), balancer.step_count))
    (one, loads, biases, metrics, steps), (other, its_loads, its_biases, its_metrics, its_steps) = results
    assert all(torch.equal(gradient, other[name]) for name, gradient in one.items())
    assert all(torch.equal(a, b) for a, b in zip(loads, its_loads, strict=True))
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(biases, its_biases, strict=True))
    assert (metrics, steps) == (its_metrics, its_steps)


def test_between_a_forward_and_its_tap():
    micro, other = make_step(masked=True)[0], make_step(seed=9, masked=True)[0]
    found = []
    for evaluates in (False, True):
        model = net()
        balancer = Balancer(model, [AuxLoss("sequence", 0.3)])
        loss = loss_of(model, micro)
        if evaluates:
            model.eval()
            with balancer.evaluation():
                model(other.x_BSD, other.mask_BS)
            model.train()
        balancer.tap(loss).backward()
        found.append(gradients(model))
    assert all(torch.equal(gradient, found[1][name]) for name, gradient in found[0].items())


def test_what_cannot_be_told_is_refused_and_what_the_error_says_helps():
    model, micro = net(), make_step()[0]
    balancer = Balancer(model, [])
    with pytest.raises(StateError, match=r"model\.eval\(\)"), balancer.evaluation():
        model(micro.x_BSD)
    with balancer.evaluation() as found:
        with pytest.raises(StateError, match="inside another"), balancer.evaluation():
            pass
        model.eval()
        model(micro.x_BSD)
    assert found["balance/tokens"] == 10
    balancer.remove()
    with pytest.raises(StateError, match=r"after remove\(\)"), balancer.evaluation():
        pass


def test_logits_that_are_no_numbers_are_an_error_that_names_the_layer():
    model, micro = net(), make_step()[0]
    balancer = Balancer(model, [], on_fault="warn")
    with torch.no_grad():
        model.blocks[1].gate.weight[2] = float("nan")
    model.eval()
    with pytest.raises(InputError, match=r"blocks\.1\.gate"), balancer.evaluation():
        model(micro.x_BSD)
