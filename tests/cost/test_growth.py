"""A training step's counted work grows no faster than tokens, experts, K and layers, and its sums not with ranks."""

from __future__ import annotations

import importlib
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {"tokens": (256, 512, 2048), "experts": (8, 16, 64), "top_k": (1, 2, 8), "layers": (1, 2, 4)}


@pytest.fixture
def growth(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("growth")


@pytest.mark.parametrize("axis", SMALL)
def test_nothing_grows_faster_than_its_axis(growth, axis):
    values = SMALL[axis]
    works = [work for _, work in growth.grow(axis, values, rounds=0)]
    times_more = values[-1] / values[0]
    assert works[-1].total <= 1.02 * times_more * works[0].total
    assert works[-1].touched <= 1.02 * times_more * works[0].touched
    first, last = (
        (more.touched - less.touched) / (values[i + 1] - values[i]) for i, (less, more) in enumerate(pairwise(works))
    )
    assert last <= 1.25 * first  # what one more costs; padding and shared products are not even


def test_more_ranks_do_not_sum_more(ranks):
    """Two sums: the loads of this micro-step, and everything else of the step; a few numbers for each expert."""
    alone, two, four = (ranks.run("cost._growth_cases:counted_step", size=size) for size in (1, 2, 4))
    assert alone == [[]]
    assert two + two == four
    assert len(two[0]) == 2
    assert sum(two[0]) <= 4 * 8 * (3 * 16 + 24)  # layers, bytes, numbers


def test_the_exponent_is_that_of_the_part_that_grows(growth):
    x = (1, 2, 4, 8, 16)
    for s in (0.5, 1.0, 1.5):
        assert growth.exponent(x, [3 + 2 * value**s for value in x]) == pytest.approx(s, abs=0.02)
    assert growth.exponent(x, [7.0, 7.1, 7.0, 7.05, 7.0]) == 0


def test_the_figure_names_every_slope(growth):
    svg = growth.figure(
        {"time": {"tokens": ((1, 2, 4), (1.0, 2.0, 4.0))}, "bytes": {"top_k": ((1, 2, 8), (1.0, 1.0, 1.0))}}
    )
    assert svg.count("<svg") == svg.count("</svg>") == 1
    assert "tokens 1–4: slope 1.00" in svg and "K 1–8: slope 0.00" in svg
