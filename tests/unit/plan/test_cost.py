"""Seconds and bytes of a step, against plain loops and what must hold whatever the machine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.plan.cluster import Cluster
from equipoise.plan.cost import memory, step_time, sum_seconds, work
from equipoise.plan.forecast import EVEN
from equipoise.plan.straggler import Straggler
from unit.plan import _reference as reference

C = Cluster(gpus=32, ep=16, experts=32, layers=3, micro_batches=2, sync="step")
SLOW = Straggler(mean=1.4, error=0.01, spread=0.1, rank_spread=0.15, draws=100)


def test_products_are_six_flops_per_parameter_and_token():
    seconds = sum(6 * 3 * C.width * C.expert_hidden for _ in range(C.layers) for _ in range(C.tokens * C.top_k)) / (
        989e12 * 0.4
    )
    assert work(C).experts == pytest.approx(seconds)
    assert work(replace(C, recompute=True)).experts == pytest.approx(seconds * 8 / 6)


def test_causal_attention_is_counted():
    """Per layer, pass and query: a product of width w with each key before it, and one with each value."""
    c = replace(C, dense_parameters=0.0, tokens=64, sequence=32)
    flops = sum(2 * 2 * c.attention_width * (query + 0.5) for query in range(32)) * 2 * c.layers * 3
    assert work(c).dense == pytest.approx(flops / (989e12 * 0.4))


def test_given_time_of_the_dense_part_is_taken():
    assert work(replace(C, dense_ms=7.0)).dense == 0.007


@pytest.mark.parametrize("ep", [1, 2, 8, 16, 32])
def test_all_to_all_against_a_loop_over_ranks(ep):
    c = replace(C, ep=ep, latency_us=0.0)
    once = reference.exchange_seconds(ep, 8, c.tokens * c.top_k, c.width * 2, 450e9 * 0.8, 50e9 * 0.8)
    assert work(c).all_to_all == pytest.approx(4 * c.layers * once)
    assert work(replace(c, overlap=0.75)).all_to_all == pytest.approx(c.layers * once)


@pytest.mark.parametrize(("ep", "top_k"), [(16, 2), (32, 4), (32, 2)])
def test_once_per_node_against_every_choice(ep, top_k):
    c = replace(C, ep=ep, top_k=top_k, latency_us=0.0, once_per_node=True, intra_gb_s=1e9)
    reached = reference.nodes_reached(ep // 8, top_k)
    assert work(c).all_to_all == pytest.approx(4 * c.layers * c.tokens * reached * c.width * 2 / 40e9)
    assert work(c).all_to_all <= work(replace(c, once_per_node=False)).all_to_all * (1 + 1e-9)


@pytest.mark.parametrize(("ranks", "ms"), [(8, 0.04), (64, 0.09), (512, 0.14), (4096, 0.19), (16384, 0.23)])
def test_a_sum_of_loads_takes_what_the_lab_note_says(ranks, ms):
    """lab-notes/2026-11-22-invariance.md, 61 layers of 256 experts."""
    assert 1e3 * sum_seconds(replace(C, link_efficiency=1.0), 17 * 61 * 256, ranks) == pytest.approx(ms, abs=0.012)


def test_a_step_against_a_loop_over_micro_batches_and_layers():
    one, seconds = work(C), 0.0
    for _ in range(C.micro_batches):
        seconds += one.dense
        for _ in range(C.layers):
            seconds += SLOW.mean * (one.experts + one.all_to_all) / C.layers
    seconds += sum_seconds(C, 17 * C.experts * C.layers, C.gpus)
    assert step_time(C, replace(SLOW, spread=0.0), counts=True).total == pytest.approx(seconds)


SUMMED_AT = {"step": [], "doubling": [1, 2, 4], "micro_batch": [1, 2, 3, 4, 5, 6], "layer": [1, 2, 3, 4, 5, 6]}


@pytest.mark.parametrize("sync", SUMMED_AT)
def test_groups_wait_for_the_slowest(sync):
    """Groups whose layers take normal times, in a loop: between two meetings the largest sum counts."""
    c = Cluster(gpus=64, ep=8, layers=6, micro_batches=6, sync=sync)
    rng, per_layer = np.random.default_rng(0), work(c).waited / 6
    waited = []
    for _ in range(4000):
        times, total, since = rng.normal(1.4, 0.1, size=(c.groups, 6, 6)), 0.0, 0
        for end in [*SUMMED_AT[sync], 6]:
            total += times[:, since:end].sum((1, 2)).max() if end > since else 0.0
            since = end
        waited.append(total - 1.4 * 36)
    assert step_time(c, SLOW, counts=True).groups == pytest.approx(per_layer * np.mean(waited), rel=0.05)


@pytest.mark.parametrize(("micro_batches", "doubling"), [(1, 1), (2, 2), (3, 2), (4, 3), (64, 7)])
def test_sums_of_a_strategy_that_needs_loads(micro_batches, doubling):
    c = replace(C, micro_batches=micro_batches)
    per_step = step_time(c, EVEN, counts=False).balance_sums
    counted = {sync: step_time(replace(c, sync=sync), EVEN, counts=True).balance_sums for sync in SUMMED_AT}
    assert counted["step"] == per_step
    one = sum_seconds(C, 8 * 32 * 3, 32)
    assert counted["doubling"] == pytest.approx(per_step + doubling * one)
    assert counted["micro_batch"] == pytest.approx(per_step + micro_batches * one)
    assert counted["layer"] == pytest.approx(per_step + 3 * micro_batches * sum_seconds(C, 8 * 32, 32))


def test_gradients_are_summed_where_copies_are():
    """One group: experts have no copies elsewhere. Each of the node's links carries a part of the dense ring."""
    c = replace(C, gpus=16, overlap_gradients=0.0)
    ring = 2 * 15 / 16 * c.dense_parameters * 4 / (400e9 * 0.8)
    assert step_time(c, EVEN, counts=False).gradients == pytest.approx(ring)
    two = replace(c, gpus=32)
    experts = 2 * 1 / 2 * 3 * 2 * c.expert_parameters * 4 / (50e9 * 0.8)
    dense = 2 * 31 / 32 * c.dense_parameters * 4 / (400e9 * 0.8)
    assert step_time(two, EVEN, counts=False).gradients == pytest.approx(dense + experts)
    assert step_time(replace(two, overlap_gradients=1.0), EVEN, counts=False).gradients == 0


def test_memory_of_the_fullest_rank_against_a_loop():
    rng, c = np.random.default_rng(0), replace(C, layers=40)
    loads = rng.normal(1.0, SLOW.rank_spread, size=(2000, c.gpus * c.micro_batches, c.layers))
    bytes_per_pair = 2 * (2 * c.width + 3 * c.expert_hidden)
    naive = loads.sum(-1).max(-1).mean() * c.tokens * c.top_k * bytes_per_pair
    assert memory(c, SLOW).fullest == pytest.approx(naive, rel=0.01)
    assert memory(c, EVEN).fullest == memory(c, EVEN).even == c.layers * c.tokens * c.top_k * bytes_per_pair
    one_layer = memory(replace(c, recompute=True), SLOW)
    assert one_layer.even == pytest.approx(memory(c, SLOW).even / 40)
    assert one_layer.fullest > SLOW.mean * one_layer.even


@settings(max_examples=40, deadline=None)
@given(st.floats(1.0, 5.0), st.floats(1.0, 5.0), st.floats(1e-2, 1e4))
def test_cost_rises_with_the_straggler_and_does_not_depend_on_the_machines_scale(first, second, scale):
    def cost(c: Cluster, mean: float) -> float:
        took = step_time(c, Straggler(mean, 0.0, 0.1, 0.0, 1), counts=False)
        return (took.straggler + took.groups) / (took.dense + took.experts + took.all_to_all)

    free = replace(C, latency_us=0.0)
    faster = replace(free, tflops=free.tflops * scale, intra_gb_s=free.intra_gb_s * scale,
                     inter_gb_s=free.inter_gb_s * scale)  # fmt: skip
    low, high = sorted((first, second))
    assert 0 < cost(free, low) <= cost(free, high) + 1e-12
    assert cost(faster, high) == pytest.approx(cost(free, high))
