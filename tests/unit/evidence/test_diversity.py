"""The gap of balance batches against what it has to be for text made to order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import ConfigError
from equipoise.evidence.diversity import diversity_gap
from equipoise.lab.data.packing import PackedData


def text(shares: dict[str, list[float]], *, windows=400, length=64, seed=0) -> PackedData:
    """Domains whose tokens are drawn one by one, so that a window has no subject of its own."""
    rng = np.random.default_rng(seed)
    rows = {name: rng.choice(len(p), (windows, length + 1), p=p).astype(np.uint16) for name, p in shares.items()}
    return PackedData(list(shares), "", len(next(iter(shares.values()))), rows, rows, {}, Path())


ALIKE = {name: [0.1, 0.2, 0.3, 0.4] for name in "ab"}
UNLIKE = {"a": [0.4, 0.4, 0.1, 0.1], "b": [0.1, 0.1, 0.4, 0.4]}
BETWEEN = 4 * 0.15**2 / (4 * 0.25**2)  # |p_a - p|^2 / |p|^2 of UNLIKE, by hand


def test_text_of_one_kind_has_no_gap_however_few_tokens():
    gap = diversity_gap(text(ALIKE), 1)
    assert abs(gap.value) < 4 * gap.error + 1e-3


def test_one_domain_at_a_time_is_as_far_off_as_the_domains_are():
    for sequences in (1, 4, 16):
        gap = diversity_gap(text(UNLIKE), sequences, per_micro_batch=sequences)
        assert gap.value == pytest.approx(BETWEEN, abs=4 * gap.error + 2e-3)


@pytest.mark.parametrize("sequences", [1, 2, 8, 32])
def test_a_mix_comes_nearer_by_its_number(sequences):
    """n independent domains: the squared distance of a mean of n is that of one over n."""
    gap = diversity_gap(text(UNLIKE), sequences, mixed=True)
    assert gap.value == pytest.approx(BETWEEN / sequences, abs=4 * gap.error + 2e-3)
    pairs = diversity_gap(text(UNLIKE), 2 * sequences, per_micro_batch=2)
    assert pairs.value == pytest.approx(BETWEEN / sequences, abs=4 * pairs.error + 2e-3)


def test_one_domain_has_nothing_between_domains():
    alone = {"a": UNLIKE["a"]}
    gap = diversity_gap(text(alone), 1)
    assert abs(gap.value) < 4 * gap.error + 1e-3


@pytest.mark.parametrize(
    "numbers", [{"sequences": 0}, {"sequences": 6, "per_micro_batch": 4}, {"sequences": 1, "draws": 0}]
)
def test_what_cannot_be_drawn(numbers):
    with pytest.raises(ConfigError, match="whole micro-batches"):
        diversity_gap(text(ALIKE), **numbers)
