"""The dataclasses of a comparison: a strategy is found by its name, and nothing is changed after it was summarized."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from equipoise.report.data.comparison import Comparison, StrategySummary


def test_a_strategy_is_found_by_its_name(comparison):
    assert isinstance(comparison, Comparison)
    for one in comparison.strategies:
        assert isinstance(one, StrategySummary)
        assert comparison[one.name] is one
    with pytest.raises(StopIteration):
        comparison["globl"]


@pytest.mark.parametrize("part", [lambda c: c, lambda c: c.strategies[0], lambda c: c.strategies[0].runs[0]])
def test_the_numbers_are_frozen(comparison, part):
    with pytest.raises(FrozenInstanceError):
        part(comparison).problems = []
