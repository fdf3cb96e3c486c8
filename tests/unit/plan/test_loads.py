"""The law of skewed shares and its fit; counts that are none."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, DataError
from equipoise.plan.loads import SOURCES, RecordedCounts, Skew, expected_maxvio, fit, shares


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1.5), st.floats(0, 2), st.sampled_from([2, 5, 32]))
def test_shares_are_shares_and_their_mean_is_what_all_text_uses(corpus, source, experts):
    q_LSE = shares(Skew(corpus, source), experts, 3, np.random.default_rng(0))
    g_LE = shares(Skew(corpus, 0.0), experts, 3, np.random.default_rng(0))[:, 0]
    assert q_LSE.shape == (3, SOURCES, experts)
    assert (q_LSE >= 0).all()
    np.testing.assert_allclose(q_LSE.sum(-1), 1)
    np.testing.assert_allclose(q_LSE.mean(1), g_LE, atol=0.02)


def test_without_skew_a_maxvio_is_the_noise_of_uniform_routing():
    """sqrt(2 ln E / mean) bounds the largest of E normal numbers from above; a plain simulation meets it."""
    experts, mean = 64, 500
    rng = np.random.default_rng(0)
    naive = [max(np.bincount(rng.integers(0, experts, experts * mean), minlength=experts)) / mean - 1
             for _ in range(200)]  # fmt: skip
    found = expected_maxvio(Skew(), experts, sources=1, pairs=experts * mean)
    assert found == pytest.approx(np.mean(naive), rel=0.03)
    assert found < np.sqrt(2 * np.log(experts) / mean)


def test_text_of_many_sources_is_more_even_than_that_of_one():
    found = [expected_maxvio(Skew(0.0, 1.0), 64, sources=n, pairs=10**6) for n in (1, 4, 16, 256)]
    assert all(2.2 * few > few > many for few, many in itertools.pairwise(found))
    assert found[-1] < 0.25 * found[0]


@pytest.mark.parametrize(("batch", "corpus"), [(0.3, 0.1), (1.5, 0.1), (4.0, 0.5)])
def test_the_fit_gives_both_numbers_back(batch, corpus):
    scope = {"experts": 64, "sources": 2, "pairs": 2 * 4096 * 4}
    skew = fit(batch, corpus, **scope)
    assert expected_maxvio(skew, **scope, seed=1) == pytest.approx(batch, rel=0.1)
    assert expected_maxvio(skew, 64, 10_000, 10**9, seed=1) == pytest.approx(corpus, rel=0.15)


def test_the_skew_means_the_same_for_another_number_of_experts():
    """Recorded with 16 experts, wanted for 128: the logits' deviation is carried over, not the MaxVio."""
    skew = Skew(0.0, 0.8)
    few = fit(expected_maxvio(skew, 16, 1, 10**6), 0.0, experts=16, sources=1, pairs=10**6)
    many = fit(expected_maxvio(skew, 128, 1, 10**6), 0.0, experts=128, sources=1, pairs=10**6)
    assert few.source == pytest.approx(0.8, abs=0.02)
    assert many.source == pytest.approx(0.8, abs=0.02)


def test_chance_is_no_skew():
    assert fit(0.01, 0.0, experts=64, sources=1, pairs=64 * 100) == Skew(0.0, 0.0)


@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 8.0])
def test_a_maxvio_that_cannot_be(value):
    with pytest.raises(ConfigError, match="MaxVio of 0 to 7"):
        fit(value, 0.1, experts=16, top_k=2, sources=1, pairs=1000)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (np.ones((2, 3)), "shape"),
        (np.ones((0, 2, 3)), "shape"),
        (np.full((1, 1, 2), np.nan), "NaN"),
        (np.full((1, 1, 2), np.inf), "infinity"),
        (np.array([[[1.0, -2.0]]]), "negative count, -2"),
        (np.zeros((1, 1, 2)), "all zero"),
    ],
)
def test_counts_that_are_none(counts, message):
    with pytest.raises(DataError, match=message):
        RecordedCounts(counts)
