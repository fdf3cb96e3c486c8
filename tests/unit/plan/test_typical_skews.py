"""Strategies with typical loads: which of them sum counts over ranks, and how their skews are ordered."""

from __future__ import annotations

import pytest

from equipoise.plan.typical_skews import TYPICAL, needs_counts, typical


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("global", True),
        ("global:exact@0.02+micro", True),
        ("shuffle", True),
        ("global:previous", False),
        ("global:ema@0.1", False),
        ("micro", False),
        ("loss-free", False),
        ("none", False),
    ],
)
def test_a_loss_over_the_global_batch_needs_the_counts_of_all_ranks(name, expected):
    assert needs_counts(name) == expected


def test_without_balancing_all_text_is_most_uneven_and_under_micro_single_sources_are_least():
    assert [one.name for one in typical()] == list(TYPICAL)
    assert max(TYPICAL, key=lambda name: TYPICAL[name].corpus) == "none"
    assert min(TYPICAL, key=lambda name: TYPICAL[name].source) == "micro"
    assert min(TYPICAL, key=lambda name: TYPICAL[name].corpus) == "loss-free"
