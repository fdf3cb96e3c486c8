"""The share of router weight that the largest of K weights hold, and the fewest experts that keep a given one."""

from __future__ import annotations

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.lab.upcycling.profile import kept_shares, smallest_top_k


def test_shares_against_a_loop():
    weights_TK = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    wanted = []
    for k in range(1, 5):
        rows = [sorted(row, reverse=True) for row in weights_TK.tolist()]
        wanted.append(sum(sum(row[:k]) / sum(row) for row in rows) / len(rows))
    assert kept_shares(weights_TK) == pytest.approx(wanted, rel=1e-6)
    assert kept_shares(weights_TK * 7) == pytest.approx(wanted, rel=1e-6)


def test_even_weights_need_all_experts_and_a_single_one_needs_one():
    assert kept_shares(torch.full((3, 4), 0.25)) == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert smallest_top_k(kept_shares(torch.full((3, 4), 0.25)), 0.95) == 4
    assert smallest_top_k(kept_shares(torch.tensor([[1.0, 0.0]])), 0.95) == 1
    assert smallest_top_k([0.6, 0.9999999999], 1.0) == 2  # rounding never asks for more than there are


@pytest.mark.parametrize("share", [0.0, 1.1, -1])
def test_what_is_no_share(share):
    with pytest.raises(ConfigError, match="above 0 and at most 1"):
        smallest_top_k([1.0], share)
