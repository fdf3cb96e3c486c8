"""A replay on one rank of two: the gap is of all tokens that were replayed, and no rank moves a bias."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.xdist_group("ranks")


def test_one_rank_replays_and_all_agree(ranks):
    one, other = ranks.run("contracts.law._replay_cases:one_rank_replays", 1, size=2)
    assert one["metrics"] == other["metrics"] and not one["gaps"]
    for layer, (missed, choices) in enumerate(other["gaps"]):
        assert missed > 0
        assert one["metrics"][f"balance/layer_{layer:02d}/replay_gap"] == pytest.approx(missed / choices, rel=1e-12)
    assert all(number == 0 for found in (one, other) for bias_E in found["replayed"] for number in bias_E)
    assert one["plain"] == other["plain"] and all(any(bias_E) for bias_E in one["plain"])
    assert "balance/replay_gap" not in one["last"]
