"""Expert choice against loops over experts and tokens; the predictor's loss against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise import ConfigError, InputError
from equipoise.functional import (
    capacity_loss,
    choose_tokens,
    kth_largest,
    prediction_counts,
    prediction_quality,
    taken_pairs,
    tokens_per_expert,
)


def naive_choice(scores: list[list[float]], count: int) -> list[set[int]]:
    """The tokens of each expert: highest score first, of equal scores the earlier token."""
    tokens, experts = range(len(scores)), range(len(scores[0]))
    return [set(sorted(tokens, key=lambda t: (-scores[t][e], t))[:count]) for e in experts]


@given(
    tokens=st.integers(1, 24), experts=st.integers(1, 6), capacity=st.floats(0.25, 6), levels=st.integers(1, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_it_is_the_loop_over_experts_with_ties_too(tokens, experts, capacity, levels, seed):
    generator = torch.Generator().manual_seed(seed)
    scores_TE = torch.randint(levels, (tokens, experts), generator=generator).double()  # few levels: many ties
    wanted = math.floor(tokens * capacity / experts + 1e-9)
    if capacity > experts or wanted < 1:
        with pytest.raises((ConfigError, InputError)):
            choose_tokens(scores_TE, capacity)
        return
    taken_TE = choose_tokens(scores_TE, capacity)
    assert tokens_per_expert(tokens, experts, capacity) == wanted
    assert [set(taken_TE[:, e].nonzero().flatten().tolist()) for e in range(experts)] == naive_choice(
        scores_TE.tolist(), wanted
    )


def test_pools_in_front_do_not_know_each_other():
    scores_NTE = torch.rand(3, 8, 2)
    taken_NTE = choose_tokens(scores_NTE, 1.0)
    for pool_TE, taken_TE in zip(scores_NTE, taken_NTE, strict=True):
        assert torch.equal(choose_tokens(pool_TE, 1.0), taken_TE)


@pytest.mark.parametrize(
    ("tokens", "experts", "capacity", "wanted"),
    [(10, 7, 0.7, 1), (30, 9, 0.3, 1), (100, 3, 0.29 * 3, 29), (7, 7, 7.0, 7), (64, 16, 1.0, 4)],
)
def test_counts_are_those_of_the_fraction_not_of_its_rounding(tokens, experts, capacity, wanted):
    assert tokens_per_expert(tokens, experts, capacity) == wanted


@pytest.mark.parametrize("capacity", [0.0, -1.0, 4.5, math.nan, math.inf])
def test_a_capacity_that_no_pool_can_have(capacity):
    with pytest.raises(ConfigError, match="0 < capacity <= num_experts"):
        choose_tokens(torch.rand(64, 4), capacity)


def test_a_pool_smaller_than_its_experts_says_what_would_do():
    with pytest.raises(InputError, match=r"a pool of 8 tokens or more(.|\n)*7 tokens for 8 experts"):
        choose_tokens(torch.rand(7, 8), 1.0)
    assert choose_tokens(torch.rand(8, 8), 1.0).sum() == 8


def test_pairs_are_the_true_entries_expert_by_expert():
    taken_TE = torch.rand(9, 4) > 0.5
    wanted = [(t, e) for e in range(4) for t in range(9) if taken_TE[t, e]]
    assert list(zip(*(ids.tolist() for ids in taken_pairs(taken_TE)), strict=True)) == wanted


def test_the_predictor_s_loss_is_cross_entropy_in_float64():
    logits_TE, taken_TE = torch.randn(5, 3, dtype=torch.float64) * 4, torch.rand(5, 3) > 0.6
    total = 0.0
    for logit, taken in zip(logits_TE.flatten().tolist(), taken_TE.flatten().tolist(), strict=True):
        p = 1 / (1 + math.exp(-logit))
        total -= math.log(p if taken else 1 - p)
    assert capacity_loss(logits_TE, taken_TE).item() == pytest.approx(total / 15, rel=1e-13)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_the_kth_largest_of_each_expert(k):
    scores_TE = torch.rand(7, 3)
    assert kth_largest(scores_TE, k).tolist() == [sorted(scores_TE[:, e].tolist())[-k] for e in range(3)]


def test_of_no_tokens_nobody_takes_one_and_nothing_is_learned():
    assert choose_tokens(torch.empty(0, 4), 1.0).shape == (0, 4)
    logits_TE = torch.empty(0, 4, requires_grad=True)
    loss = capacity_loss(logits_TE, torch.empty(0, 4, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0


def test_what_a_predictor_gets_right_is_the_loop_and_adds_up():
    generator = torch.Generator().manual_seed(0)
    predicted_TE, taken_TE = (torch.rand(50, 4, generator=generator) < share for share in (0.4, 0.25))
    pairs = list(zip(predicted_TE.flatten().tolist(), taken_TE.flatten().tolist(), strict=True))
    right = sum(p == t for p, t in pairs) / len(pairs)
    said, there = sum(p for p, _ in pairs), sum(t for _, t in pairs)
    both = sum(p and t for p, t in pairs)
    parts = [prediction_counts(p, t) for p, t in zip(predicted_TE.split(20), taken_TE.split(20), strict=True)]
    assert prediction_quality(sum(parts[1:], parts[0])) == pytest.approx((right, both / said, both / there))
    nothing = prediction_quality(prediction_counts(*2 * (torch.zeros(3, 2, dtype=torch.bool),)))
    assert nothing[0] == 1 and all(math.isnan(one) for one in nothing[1:])
