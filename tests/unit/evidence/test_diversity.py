"""The gap of balance batches against what it has to be for text made to order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from equipoise.errors import ConfigError
from equipoise.evidence.diversity import diversity_gap, diversity_of
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


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(("sequences", "micro"), [(1, 1), (1, 4), (4, 4), (32, 4), (96, 4)])
def test_the_closed_form_is_the_mean_of_all_draws(sequences, micro, mixed):
    """Windows with a subject of their own, so that there is a spread within domains too."""
    rng = np.random.default_rng(1)
    rows = {name: np.stack([rng.choice(6, 65, p=rng.dirichlet(p)) for _ in range(60)]).astype(np.uint16)
            for name, p in (("a", [3, 1, 1, 1, 1, 1]), ("b", [1, 1, 1, 1, 1, 5]))}  # fmt: skip
    data = PackedData(["a", "b"], "", 6, rows, rows, {}, Path())
    how = {"per_micro_batch": micro, "mixed": mixed}
    drawn, known = diversity_gap(data, sequences, draws=600, **how), diversity_of(data).gap(sequences, **how)
    assert known.value == pytest.approx(drawn.value, abs=4 * drawn.error)


def test_the_closed_form_knows_how_well_it_knows():
    """Twice as many windows have errors lower by the root of two; the gaps of many samples spread by so much."""
    found = [diversity_of(text({"a": [0.4, 0.4, 0.1, 0.1]}, windows=30, length=16, seed=seed)) for seed in range(200)]
    spread = np.std([one.within for one in found], ddof=1)
    assert np.mean([one.within_error for one in found]) == pytest.approx(spread, rel=0.25)
    assert found[0].gap(8, mixed=True).error == pytest.approx(found[0].gap(1).error / 8)


def test_windows_of_one_token_are_refused():
    rows = {"a": np.zeros((3, 2), np.uint16)}
    with pytest.raises(ConfigError, match="2 tokens or more"):
        diversity_of(PackedData(["a"], "", 4, rows, rows, {}, Path()))
