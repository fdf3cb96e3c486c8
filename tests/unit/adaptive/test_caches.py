"""Simulated caches against a cache that is played through use by use, and allocations against all there are."""

from __future__ import annotations

import itertools
from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.adaptive import RecordedChoices, allocate, cache_use, stack_distances
from equipoise.adaptive.caches import even, hits_by_size

quick = settings(max_examples=40, deadline=None)


def choices_of(seed: int, *, tokens: int = 40, layers: int = 2, experts: int = 6, top_k: int = 2) -> np.ndarray:
    """Distinct experts a token, uneven, some of them dropped but never the first."""
    draw = np.random.default_rng(seed)
    share = draw.dirichlet(np.full(experts, 0.5) + 1e-3)
    share = (share + 0.01) / (share + 0.01).sum()
    ids = np.array(
        [[draw.choice(experts, top_k, replace=False, p=share) for _ in range(layers)] for _ in range(tokens)]
    )
    ids[..., 1:][draw.random((tokens, layers, top_k - 1)) < 0.3] = -1
    return ids


def played(ids_TK: np.ndarray, size: int) -> list[list[bool]]:
    """What is found: all experts of a token are looked up first, then used from the last choice to the first."""
    kept: OrderedDict[int, None] = OrderedDict()
    found = []
    for row in ids_TK.tolist():
        found.append([expert in kept for expert in row])
        for expert in [one for one in reversed(row) if one >= 0]:
            kept[expert] = None
            kept.move_to_end(expert)
        while len(kept) > size:
            kept.popitem(last=False)
    return found


@quick
@given(st.integers(0, 2**20), st.integers(2, 4), st.integers(0, 7))
def test_a_distance_says_which_sizes_have_it(seed, top_k, size):
    ids_TLK = choices_of(seed, top_k=top_k)
    distances_TLK = stack_distances(ids_TLK, 6)
    for layer in range(2):
        want = np.array(played(ids_TLK[:, layer], size))
        used = ids_TLK[:, layer] >= 0
        got = (distances_TLK[:, layer] >= 0) & (distances_TLK[:, layer] < min(size, 6))
        assert (got[used] == want[used]).all()
        assert hits_by_size(distances_TLK, 6)[layer, min(size, 6)] == want[used].sum()


@quick
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 5), st.integers(0, 20))
def test_an_allocation_is_the_best_of_all(seed, layers, experts, total):
    draw = np.random.default_rng(seed)
    hits_LC = np.concatenate([np.zeros((layers, 1), int), draw.integers(0, 9, (layers, experts))], 1).cumsum(1)
    found = allocate(hits_LC, total)
    assert len(found) == layers and sum(found) <= total and max(found) <= experts
    best = max(
        sum(hits_LC[i, c] for i, c in enumerate(sizes))
        for sizes in itertools.product(range(experts + 1), repeat=layers)
        if sum(sizes) <= total
    )
    assert sum(hits_LC[i, c] for i, c in enumerate(found)) == best


def test_use_counts_loads_and_what_was_not_foreseen():
    used = choices_of(3, tokens=200, layers=3)
    predicted = np.where(np.random.default_rng(0).random(used.shape) < 0.5, used, (used + 1) % 6)
    predicted[:, 0] = -1
    recorded = RecordedChoices(used, predicted, [6, 6, 6])
    sizes = [1, 3, 4]
    hits = loads = waits = uses = 0
    for layer, size in enumerate(sizes):
        for t, row in enumerate(played(used[:, layer], size)):
            for k, hit in enumerate(row):
                if used[t, layer, k] >= 0:
                    uses, hits, loads = uses + 1, hits + hit, loads + (not hit)
                    waits += not hit and used[t, layer, k] not in predicted[t, layer].tolist()
    found = cache_use(recorded, stack_distances(used, 6), sizes)
    assert (found.hits, found.loads, found.waits) == pytest.approx((hits / uses, loads / 600, waits / 600))
    whole = cache_use(recorded, stack_distances(used, 6), [6, 6, 6])
    assert whole.hits == 1 - sum(len(set(used[:, i].ravel().tolist()) - {-1}) for i in range(3)) / uses, "first uses"


def test_even_shares():
    assert even(4, 10) == [3, 3, 2, 2] and even(2, 0) == [0, 0]
