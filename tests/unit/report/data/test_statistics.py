"""Intervals against the t distribution itself and against textbook formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.data.statistics import Difference, estimate, paired_difference, t_quantile


def difference_of(treated: dict, baseline: dict, **options) -> Difference:
    found = paired_difference(treated, baseline, **options)
    assert found is not None
    return found


def bounds(difference: Difference) -> list[float]:
    assert difference.low is not None
    assert difference.high is not None
    return [difference.mean, difference.low, difference.high]


def t_probability(value: float, degrees: int) -> float:
    """P(-value < T < value), by integrating the density."""
    log_scale = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    t = np.linspace(0, value, 200_001)
    density = np.exp(log_scale - (degrees + 1) / 2 * np.log1p(t * t / degrees))
    return float(2 * np.trapezoid(density, t))


@pytest.mark.parametrize("degrees", [*range(1, 31), 31, 45, 100, 1000])
def test_t_quantile_leaves_five_percent_outside(degrees):
    assert t_probability(t_quantile(degrees), degrees) == pytest.approx(0.95, abs=2e-5)


def test_no_interval_from_one_value():
    with pytest.raises(ValueError, match="two values"):
        t_quantile(0)
    difference = difference_of({3: 2.0}, {3: 1.0})
    assert (difference.mean, difference.low, difference.high, difference.n) == (1.0, None, None, 1)
    assert not difference.is_clear


values = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(values, values), min_size=2, max_size=12))
def test_paired_difference_is_the_textbook_interval(pairs):
    a, b = (dict(enumerate(column)) for column in zip(*pairs, strict=True))
    d = np.array([x - y for x, y in pairs])
    half = t_quantile(len(d) - 1) * d.std(ddof=1) / math.sqrt(len(d))
    found = difference_of(a, b)
    assert found.n == len(d)
    assert bounds(found) == pytest.approx([d.mean(), d.mean() - half, d.mean() + half], abs=1e-8)
    back = difference_of(b, a)
    mean, low, high = bounds(found)
    assert bounds(back) == pytest.approx([-mean, -high, -low], abs=1e-9)


@given(st.lists(st.floats(-3, 3), min_size=2, max_size=6), st.floats(-0.5, 0.5))
def test_what_all_strategies_share_does_not_widen_a_paired_interval(seeds, effect):
    base = {i: math.exp(s) for i, s in enumerate(seeds)}
    found = difference_of({i: value * math.exp(effect) for i, value in base.items()}, base, ratio=True)
    assert bounds(found) == pytest.approx([math.expm1(effect)] * 3, abs=1e-6)


def test_only_seeds_that_both_have_are_paired():
    found = difference_of({0: 1.0, 1: 2.0, 2: math.nan, 5: 9.0}, {1: 1.0, 2: 1.0, 0: 3.0, 7: 0.0})
    assert found.by_seed == {0: -2.0, 1: 1.0}
    assert paired_difference({0: 1.0}, {1: 1.0}) is None
    assert paired_difference({0: math.inf}, {0: 1.0}) is None


def test_estimate_of_a_ratio_is_geometric_and_says_its_range():
    found = estimate({4: 8.0, 2: 2.0}, ratio=True)
    assert found is not None
    assert (found.mean, found.low, found.high, found.n) == (pytest.approx(4.0), 2.0, 8.0, 2)
    assert estimate({0: math.nan}) is None
    assert estimate({}) is None
