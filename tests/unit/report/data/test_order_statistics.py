"""The largest of several random numbers against integration and simulation; functional/test_metrics has the floor."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.report.data.order_statistics import expected_max, random_maxvio
from unit.plan import _reference as reference


@pytest.mark.parametrize("n", [2, 3, 10, 100, 4096])
def test_the_largest_of_n_normal_numbers(n):
    assert expected_max(n) == pytest.approx(reference.largest_normal(n), rel=0.05)


@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(64, 1, 8), (512, 2, 16), (4096, 8, 64)])
def test_the_floor_is_what_random_routing_shows(tokens, top_k, experts):
    """Every token chooses ``top_k`` different experts at random."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        chosen_TK = rng.random((tokens, experts)).argpartition(top_k, axis=1)[:, :top_k]
        counts_E = np.bincount(chosen_TK.ravel(), minlength=experts)
        found.append(counts_E.max() / counts_E.mean() - 1)
    assert random_maxvio(tokens, top_k, experts) == pytest.approx(np.mean(found), rel=0.06)


def test_a_router_without_a_choice_is_even():
    assert random_maxvio(100, 8, 8) == random_maxvio(0, 2, 8) == random_maxvio(100, 1, 1) == 0
