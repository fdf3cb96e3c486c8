"""The tables of a comparison: every digit can be copied, and colour means an interval without zero."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from equipoise.report.data.comparison_columns import COMPARISON_COLUMNS
from equipoise.report.data.statistics import Difference
from equipoise.report.html.tables import (
    card,
    estimators_table,
    frequency_table,
    numbers_table,
    per_domain_table,
    policies_table,
    runs_table,
)
from unit.report._parsed import drawn


def row_of(text, label):
    return next(row for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL) if f">{label}" in row)


def test_all_numbers_are_there_to_every_digit(comparison):
    text = drawn(numbers_table(comparison))
    for column in COMPARISON_COLUMNS:
        for one in comparison.strategies:
            if (value := one.values[column.key]) is not None:  # None: what is the same for every token of such a run
                assert f'data-value="{value.mean}"' in text
    assert text.count("uniform random: ") == 6


@pytest.mark.parametrize(
    ("low", "high", "marks"),
    [(-0.02, -0.01, ('class="best"', 'class="good"')), (0.01, 0.02, ('class="bad"',)), (-0.01, 0.02, ())],
)
def test_colour_needs_an_interval_without_zero(comparison, low, high, marks):
    difference = Difference((low + high) / 2, low, high, 2, {0: low, 1: high})
    base = replace(comparison.strategies[0], differences={})
    other = replace(comparison.strategies[1], differences={"perplexity": difference})
    row = row_of(drawn(numbers_table(replace(comparison, strategies=[base, other]))), "Perplexity")
    found = {mark for mark in ('class="best"', 'class="good"', 'class="bad"') if mark in row}
    assert found == set(marks)
    assert ("not told apart" in card(comparison, other, 1)["about"][-1]) == (not marks)


def test_domains_estimators_runs_and_policies_are_named_safely(comparison):
    evil = "<script>"
    runs = [replace(one, status=evil, path=evil) for one in comparison.strategies[0].runs]
    one = replace(comparison.strategies[0], name=evil, policies=[evil, "AuxLoss()"], runs=runs)
    found = replace(comparison, strategies=[one], domains=[*comparison.domains[:1]])
    for made in (per_domain_table, estimators_table, runs_table, policies_table):
        text = drawn(made(found))
        assert evil not in text and "&lt;script&gt;" in text
    assert f'data-value="{one.domain_perplexity["python"].mean}"' in drawn(per_domain_table(found))
    assert "in use" in drawn(estimators_table(comparison))
    assert "1.2 M" in drawn(runs_table(comparison)) and "AuxLoss()" in drawn(policies_table(found))


def test_loss_by_how_frequent_a_token_is(comparison):
    text = drawn(frequency_table(comparison))
    for side in ("input", "target"):
        for one in comparison.strategies:
            assert len(one.tenth_losses[side]) == 10
            assert all(f'data-value="{value.mean}"' in text for value in one.tenth_losses[side])
    rarest = row_of(text, "rarest tenth")
    assert "rarest tenth" in rarest and "most frequent tenth" not in rarest
    assert text.index("by the token that is read") < text.index("by the token that is predicted")
    other = next(one for one in comparison.strategies if one.name != comparison.baseline)
    assert other.tenth_differences["input"][9].mean == pytest.approx(
        other.tenth_losses["input"][9].mean - comparison[comparison.baseline].tenth_losses["input"][9].mean
    )
    older = [replace(one, tenth_losses={"input": [], "target": []}) for one in comparison.strategies]
    assert frequency_table(replace(comparison, strategies=older)) is None
