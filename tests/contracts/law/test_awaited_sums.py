"""A micro-step's sum begins at the tap and is waited for at the first router: the head's backward hides it."""

from __future__ import annotations

import pytest
import torch

from contracts.law._model import Micro, assert_close, aux, loss_of, make_step, net, new_history, twin
from contracts.law._reference import reference_step

CASES = "contracts.law._awaited_cases:steps"


def reference(scope: str, estimator: str) -> dict[str, torch.Tensor]:
    """Gradients of the second step, in one process: micro-step m holds the m-th micro-batch of both ranks."""
    model, history = net(dtype=torch.float64), new_history()
    follower = torch.optim.SGD(model.parameters(), lr=0.1)
    found: dict[str, torch.Tensor] = {}
    for number in range(2):
        batches = make_step(number, micro_batches=8, dtype=torch.float64)
        pairs = zip(batches[:4], batches[4:], strict=True)
        step = [Micro(torch.cat([a.x_BSD, b.x_BSD]), torch.cat([a.target_BSD, b.target_BSD])) for a, b in pairs]
        other = twin(model)
        found = reference_step(other, step, loss_of, [aux(scope, estimator=estimator)], history).gradients
        for name, parameter in model.named_parameters():
            parameter.grad = found[name]
        follower.step()
    return found


@pytest.mark.parametrize("mode", ["plain", "reentrant", "non_reentrant"])
@pytest.mark.parametrize(("scope", "estimator"), [("global_batch", "prefix"), ("data_parallel", "previous")])
def test_the_sum_travels_beside_the_heads_backward(ranks, mode, scope, estimator):
    for diaries, _, gradients in ranks.run(CASES, mode, scope, estimator):
        assert diaries == [["begins", "head", "waits"]] * 8
        assert_close(gradients, reference(scope, estimator), 1e-11)


def test_a_compiled_router_is_waited_for_at_the_tap(ranks):
    """It reads at an address and calls nobody."""
    for diaries, _, gradients in ranks.run(CASES, "compiled", "global_batch", "prefix", timeout=300):
        assert diaries == [["begins", "waits", "head"]] * 8
        assert_close(gradients, reference("global_batch", "prefix"), 1e-11)


@pytest.mark.parametrize("estimator", ["filled", "prefix"])
def test_when_it_is_waited_for_changes_time_alone(ranks, estimator):
    late, at_once = (ranks.run(CASES, "plain", "global_batch", estimator, now, 0.2) for now in (False, True))
    for (_, hidden, ours), (_, waited, theirs) in zip(late, at_once, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert hidden < 0.1 < 0.5 < waited, "of three sums or four: 0.2 s each, beside a head of 0.2 s"


@pytest.mark.parametrize("estimator", ["previous", "ema"])
def test_these_sum_nothing_inside_backward(ranks, estimator):
    for diaries, _, _ in ranks.run(CASES, "plain", "global_batch", estimator):
        assert diaries == [["head"]] * 8


def test_filled_sums_at_the_first_second_fourth_micro_step(ranks):
    for diaries, _, _ in ranks.run(CASES, "plain", "global_batch", "filled"):
        summed = ["begins", "head", "waits"]
        assert diaries == [summed, summed, ["head"], summed] * 2


def test_measuring_estimators_changes_no_gradient_though_it_sums_more_often(ranks):
    """`filled` looks at the micro-steps that it would have seen."""
    plain, measured = (ranks.run(CASES, "plain", "global_batch", "filled", False, 0.0, on) for on in (False, True))
    for (_, _, ours), (diaries, _, theirs) in zip(plain, measured, strict=True):
        assert diaries == [["begins", "head", "waits"]] * 8
        assert_close(ours, theirs, 1e-12)
