"""The slowest rank: against enumeration, extreme values of normal numbers, and what must hold for any loads."""

from __future__ import annotations

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from equipoise.plan.cluster import Cluster
from equipoise.plan.loads import Batch, RecordedCounts, Skew
from equipoise.plan.straggler import slowest, straggler
from unit.plan import _reference as reference

SMALL = {"gpus": 8, "layers": 2, "experts": 8, "top_k": 1, "sequence": 1}


def small(**settings) -> Cluster:
    return Cluster(**(SMALL | settings))


@pytest.mark.parametrize(("ep", "tokens", "replicas"), [(2, 2, 1), (2, 4, 1), (4, 1, 1), (4, 2, 2), (8, 1, 4)])
def test_uniform_routing_against_every_assignment(ep, tokens, replicas):
    cluster = small(ep=ep, tokens=tokens, replicas=replicas)
    found = straggler(Skew(), cluster)
    exact = reference.expected_factor(cluster.pairs, ep // replicas)
    assert found.mean == pytest.approx(exact, abs=5 * max(found.error, 1e-12))
    assert found.error < 0.02


def test_the_mean_is_that_of_the_single_layers_and_micro_batches():
    found, factors = straggler(Skew(0.2, 1.0), Cluster(), seed=3), slowest(Skew(0.2, 1.0), Cluster(), seed=3)
    assert (found.mean, found.draws) == (float(factors.mean()), factors.size)
    assert factors.min() >= 1


@pytest.mark.parametrize("ep", [2, 4])
def test_recorded_counts_against_every_way_to_draw_them(ep):
    counts_MLE = np.random.default_rng(3).integers(1, 60, size=(3, 2, 8))
    found = straggler(RecordedCounts(counts_MLE), small(ep=ep))
    exact = reference.bootstrap_factor(counts_MLE, ep, ep)
    draws = found.spread / np.sqrt(found.draws)
    assert found.mean == pytest.approx(exact, abs=5 * draws)


def test_thousands_of_ranks_against_extreme_values():
    """Uniform noise only: every rank is close to normal with variance (1 - 1/R) / mean load."""
    ranks, tokens = 2048, 512
    found = straggler(Skew(), Cluster(gpus=ranks, ep=ranks, experts=ranks, top_k=1, tokens=tokens, sequence=tokens))
    expected = 1 + reference.largest_normal(ranks) * np.sqrt((1 - 1 / ranks) / tokens)
    assert found.mean - 1 == pytest.approx(expected - 1, rel=0.04)  # Poisson loads have a longer tail than normal ones
    assert found.rank_spread == pytest.approx(1 / np.sqrt(tokens), rel=0.01)


def test_the_spread_is_that_of_one_layer_from_micro_batch_to_micro_batch():
    """What all micro-batches of a layer share does not add up over groups: a fixed skew has no spread."""
    counts_MLE = np.array([[[4.0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 9]]])
    found = straggler(RecordedCounts(counts_MLE), small(ep=2))
    assert found.spread == pytest.approx(0, abs=1e-12)
    assert found.mean == pytest.approx((7 / 5.5 + 12 / 8) / 2)
    assert found.error > 0


@pytest.mark.parametrize("placement", ["contiguous", "strided"])
@pytest.mark.parametrize(("ep", "replicas"), [(4, 1), (8, 2), (2, 2)])
def test_placement_against_a_loop(placement, ep, replicas):
    counts_E = np.array([9.0, 1, 1, 1, 8, 1, 2, 2])
    cluster = small(ep=ep, replicas=replicas, placement=placement)
    expected = reference.factor(reference.part_loads(list(counts_E), ep // replicas, replicas, placement))
    assert straggler(RecordedCounts(counts_E[None, None]), cluster).mean == pytest.approx(expected)


def test_packed_placement_separates_the_hot_experts():
    counts_E = np.array([9.0, 8, 1, 1, 1, 1, 1, 2])
    found = {one: straggler(RecordedCounts(counts_E[None, None]), small(ep=2, placement=one)).mean
             for one in ("contiguous", "packed")}  # fmt: skip
    assert found["contiguous"] == pytest.approx(19 / 12)
    assert found["packed"] == pytest.approx(12 / 12)


counts = arrays(float, (2, 2, 8), elements=st.integers(0, 1000).map(float)).filter(lambda c: (c.sum(-1) > 0).all())


@settings(max_examples=30, deadline=None)
@given(counts, st.sampled_from([1, 2, 4, 8]), st.floats(0.001, 1e6))
def test_never_below_one_and_only_ratios_matter(counts_MLE, ep, scale):
    found = straggler(RecordedCounts(counts_MLE), small(ep=ep))
    assert found.mean >= 1 - 1e-9
    assert straggler(RecordedCounts(counts_MLE * scale), small(ep=ep)).mean == pytest.approx(found.mean)


@settings(max_examples=30, deadline=None)
@given(counts, st.sampled_from(["contiguous", "strided"]))
def test_more_ranks_for_the_same_experts_never_help(counts_MLE, placement):
    """One recorded micro-batch: all ranks bring the same text, only the experts' division changes."""
    loads = RecordedCounts(counts_MLE[:1])
    found = [straggler(loads, small(ep=ep, placement=placement)).mean for ep in (1, 2, 4, 8)]
    assert found[0] == pytest.approx(1)
    assert all(few <= many + 1e-9 for few, many in itertools.pairwise(found))


@pytest.mark.parametrize("placement", ["contiguous", "strided", "packed"])
def test_even_loads_make_nobody_wait(placement):
    found = straggler(RecordedCounts(np.full((3, 2, 8), 17.0)), small(ep=4, placement=placement))
    assert (found.mean, found.error, found.spread) == pytest.approx((1.0, 0.0, 0.0))


@pytest.mark.parametrize("which", ["corpus", "source"])
def test_more_skew_makes_the_slowest_rank_slower(which):
    found = [straggler(Skew(**{which: x}), Cluster()) for x in (0.0, 0.2, 0.5, 0.8, 1.2, 2.0)]
    assert all(a.mean + 3 * a.error < b.mean for a, b in itertools.pairwise(found))


def test_copies_of_experts_divide_a_fixed_skew_and_more_text_evens_out_the_sources():
    alone = straggler(Skew(0.0, 1.0), Cluster(gpus=128, ep=128))
    copied = straggler(Skew(0.0, 1.0), Cluster(gpus=1024, ep=1024, replicas=8))
    assert copied.mean - 1 < 0.6 * (alone.mean - 1)


def test_a_gpu_with_many_short_texts_is_more_even_than_one_with_a_long_one():
    """The variance of n texts' mean is 1/n of one text's: the rank's spread falls as 1/2 from 1 to 4 texts."""
    long, short = (straggler(Skew(0.0, 0.6), Cluster(tokens=65536, sequence=n)) for n in (65536, 16384))
    assert short.rank_spread == pytest.approx(long.rank_spread / 2, rel=0.1)
    assert short.mean + 5 * short.error < long.mean


def test_the_same_seed_gives_the_same_numbers():
    one, two, other = (straggler(Skew(0.1, 1.0), Cluster(), seed=seed) for seed in (1, 1, 2))
    assert one == two
    assert other.mean != one.mean
    assert other.mean == pytest.approx(one.mean, abs=5 * (one.error + other.error))


def test_loads_add_up_to_the_pairs():
    batch = Batch(experts=16, parts=4, ranks=4, sources=4, pairs=1000)
    for loads in (Skew(0.3, 1.0), RecordedCounts(np.random.default_rng(0).random((5, 2, 16)))):
        drawn_LBR = loads.draw(0, (3, 2), batch)
        assert drawn_LBR.shape == (3, 2, 4)
        np.testing.assert_allclose(drawn_LBR.sum(-1), 1000)


def test_four_thousand_ranks_and_experts_in_seconds_and_bounded_memory():
    tracemalloc.start()
    start = time.process_time()
    straggler(Skew(0.1, 1.0), Cluster(gpus=4096, ep=4096, experts=4096))
    seconds, (_, peak) = time.process_time() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 10
    assert peak < 400e6
