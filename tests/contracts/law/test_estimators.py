"""Which f under accumulation: each estimator against its formula over several steps, and fidelity by brute force."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from contracts.law._model import (
    assert_close,
    aux,
    gradients,
    loss_of,
    make_step,
    net,
    new_history,
    policy,
    train_step,
    twin,
)
from contracts.law._reference import estimated_fraction, reference_step, token_values
from equipoise import AuxLoss, Balancer, StateError

DOUBLE: dict[str, Any] = {"dtype": torch.float64}


@pytest.mark.parametrize("estimator", ["prefix", "previous", "ema", "exact"])
@pytest.mark.parametrize("mode", ["plain", "non_reentrant"])
def test_each_estimator_is_its_formula(estimator, mode):
    """B33: the prefix is the paper's buffer, named; previous and ema push nothing at the first step."""
    description = [aux("global_batch", estimator=estimator, decay=0.6)]
    model = net(mode=mode, **DOUBLE)
    other = twin(model)
    balancer = Balancer(model, [policy(description[0])])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    follower = torch.optim.SGD(other.parameters(), lr=0.1)
    history = new_history()
    for seed in range(4):
        step = make_step(seed, 3, **DOUBLE)
        expected = reference_step(other, step, loss_of, description, history)
        assert_close(train_step(model, balancer, optimizer, step), expected.gradients, 1e-11)
        assert balancer.metrics()["balance/global/loss"] == pytest.approx(expected.values[0], rel=1e-9)
        if seed == 0 and estimator in ("previous", "ema"):
            assert balancer.metrics()["balance/global/gradient_ratio"] == 0
        for name, parameter in other.named_parameters():
            parameter.grad = expected.gradients[name]
        follower.step()


def test_exact_without_counting_works_for_one_micro_batch_only():
    model = net()
    balancer = Balancer(model, [AuxLoss("global_batch", 0.3, estimator="exact")])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    assert balancer.needs_counting
    one = train_step(model, balancer, optimizer, make_step(0), count=False)
    fresh = net()
    micro = Balancer(fresh, [AuxLoss("micro_batch", 0.3)])
    assert not micro.needs_counting
    assert_close(one, train_step(fresh, micro, torch.optim.SGD(fresh.parameters(), lr=0.0), make_step(0)), 1e-6)
    with pytest.raises(StateError, match=r"(?s)whole step.*micro-batch 2.*balancer\.counting"):
        train_step(model, balancer, optimizer, make_step(0, 2), count=False)


@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("uneven", [False, True])
def test_fidelity_is_the_gradient_at_the_logits(gate, uneven):
    """Relative error and cosine of every estimator against exact, by autograd over all tokens and layers."""
    model = net(gate=gate, **DOUBLE)
    other = twin(model)
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.1)], measure_estimators=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = new_history()
    for seed in range(3):
        step = make_step(seed, 3, masked=uneven, **DOUBLE)
        other.load_state_dict(model.state_dict())
        expected = reference_step(other, step, loss_of, [aux("micro_batch", 0.1)], history)
        train_step(model, balancer, optimizer, step)
        past = new_history()
        past.steps = history.steps[:-1]
        found = balancer.estimator_error()
        assert found is not None
        for estimator in ("prefix", "previous", "ema"):
            pairs = []
            for m, row in enumerate(expected.seen):
                for layer, one in enumerate(row):
                    weight = 1 / max(one.num_valid, 1)
                    pair = []
                    for name in (estimator, "exact"):
                        f = estimated_fraction(expected.seen, layer, m, name, 0.9, past)
                        values = token_values(one, [f] * one.logits_TE.shape[0])
                        pair.append(weight * torch.autograd.grad(values.sum(), one.logits_TE, retain_graph=True)[0])
                    pairs.append(pair)
            got, truth = (torch.cat([p[i].flatten() for p in pairs]) for i in (0, 1))
            error = ((got - truth).norm() / truth.norm()).item()
            cosine = (got @ truth / (got.norm() * truth.norm()).clamp(min=1e-300)).item()
            assert found["relative_error"][estimator] == pytest.approx(error, rel=1e-6, abs=1e-9)
            assert found["cosine"][estimator] == pytest.approx(cosine, rel=1e-6, abs=1e-9)
            if seed == 0 and estimator != "prefix":
                assert found["relative_error"][estimator] == pytest.approx(1.0)


def test_fidelity_is_none_unless_measured():
    model = net()
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.1)])
    train_step(model, balancer, torch.optim.SGD(model.parameters(), lr=0.0), make_step(0))
    assert balancer.estimator_error() is None


def test_a_skipped_micro_batch_order_does_not_matter_for_the_invariant_ones():
    """previous and ema do not see the order of micro-batches; the prefix does, and says so by its numbers (B33)."""
    found: dict[str, list[dict[str, torch.Tensor]]] = {}
    for estimator in ("previous", "ema", "exact", "prefix"):
        for reverse in (False, True):
            model = net(**DOUBLE)
            balancer = Balancer(model, [AuxLoss("global_batch", 0.5, estimator=estimator)])
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            train_step(model, balancer, optimizer, make_step(0, 4, **DOUBLE))
            step = make_step(1, 4, **DOUBLE)
            step = step[::-1] if reverse else step
            found.setdefault(estimator, []).append(train_step(model, balancer, optimizer, step))
            assert not gradients(model)
    for estimator in ("previous", "ema", "exact"):
        assert_close(found[estimator][1], found[estimator][0], 1e-11)
    with pytest.raises(AssertionError):
        assert_close(found["prefix"][1], found["prefix"][0], 1e-6)
