"""Defects of other engines that need two ranks to show, each by its number (see docs/defects.md)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contracts.law._reference import naive_bias_step
from contracts.peers._law import choices, factor, law

pytestmark = pytest.mark.xdist_group("ranks")


def skewed(tokens: int, seed: int = 0, experts: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)


@pytest.mark.parametrize("size", [2, 4])
def test_B01_the_global_loss_is_whole_on_any_number_of_ranks(ranks, size):
    """After the data-parallel mean every token has the gradient that one process gives it, not 1/dp of it."""
    logits_TE = skewed(32)
    _, gradient_TE = law(logits_TE, 2)
    got = ranks.run("contracts.law._defect_cases:push_of_a_part", logits_TE, 2, "global_batch", size=size)
    assert factor(torch.cat(got) / size, gradient_TE) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("scope", ["sequence", "micro_batch", "global_batch"])
def test_B02_B14_a_sequence_cut_over_ranks_is_one_sequence(ranks, scope):
    """f is of all parts, and the gradient neither halves nor doubles with them."""
    logits_TE = skewed(32)
    _, gradient_TE = law(logits_TE, 2)
    got = ranks.run("contracts.law._defect_cases:push_of_a_part", logits_TE, 2, scope, 1.0, True, size=2)
    assert factor(torch.cat(got) / 2, gradient_TE) == pytest.approx(1, rel=1e-4)


def test_B09_a_trainer_that_multiplies_by_world(ranks):
    """What DDP divides again: the balance gradient follows the loss, and stays that of one process."""
    logits_TE = skewed(32)
    _, gradient_TE = law(logits_TE, 2)
    got = ranks.run("contracts.law._defect_cases:sum_push_of_a_part", logits_TE, 2, size=2)
    assert factor(torch.cat(got) / 2, gradient_TE) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize(("rule", "rate"), [("sign", 0.01), ("proportional", 0.1)])
def test_B40_B41_biases_move_by_the_load_of_all_ranks(ranks, rule, rate):
    """Equal to the last bit on every rank, and by the sign of the whole load: not a mean of the ranks' own signs."""
    steps_NTE = torch.stack([skewed(24, seed) for seed in range(4)])
    found = ranks.run("contracts.law._defect_cases:biases_after", steps_NTE, rule, rate, size=2)
    assert torch.equal(found[0][0], found[1][0])
    bias = [0.0] * 8
    for logits_TE, load in zip(steps_NTE, found[0][1], strict=True):
        counts = [0] * 8
        for row in logits_TE:
            for e in choices(row.double().sigmoid() + torch.tensor(bias, dtype=torch.float64), 2):
                counts[e] += 1
        assert load == counts
        bias, _ = naive_bias_step(bias, counts, rule, rate, [])
    assert found[0][0].tolist() == pytest.approx(bias, abs=1e-6)


def test_B83_router_weights_stay_equal_on_all_ranks(ranks):
    """The balance gradient takes the road of every other one: DDP averages it, and weights are those of one process."""
    (alone,) = ranks.run("contracts.law._defect_cases:routers_under_ddp", 3, size=1)
    found = ranks.run("contracts.law._defect_cases:routers_under_ddp", 3, size=2)
    assert len(alone) == 2
    for name, weight in alone.items():
        assert torch.equal(found[0][name], found[1][name])
        torch.testing.assert_close(found[0][name], weight, rtol=1e-5, atol=1e-6)
