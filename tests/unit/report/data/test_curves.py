"""The data of the charts: means over seeds, bins of noisy series, and limits that keep a page small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.data.curves import (
    MOST_POINTS,
    binned,
    charts,
    domain_share,
    join,
    load_maps,
    thin,
    training_metrics,
)
from equipoise.report.data.groups import Grouping
from equipoise.report.data.run_view import view_run
from equipoise.storage.run_record import read_run


@given(st.integers(1, 500), st.integers(1, 60))
def test_thinned_items_keep_their_order_the_last_and_where_there_is_room_the_first(count, most):
    items = list(range(count))
    found = thin(items, most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found)) and found[-1] == count - 1
    assert most == 1 or found[0] == 0


def test_seeds_are_joined_over_the_steps_that_all_have():
    curve = join([{1: 1.0, 2: 2.0, 3: float("nan")}, {2: 4.0, 3: 5.0}])
    assert curve is not None
    assert (curve.steps, curve.mean, curve.low, curve.high) == ([2], [3.0], [2.0], [4.0])
    apart = join([{1: 1.0}, {2: 4.0}])
    assert apart is not None and apart.steps == [1, 2]
    assert join([{}, {3: float("nan")}]) is None


@given(st.integers(1, 700))
def test_a_binned_curve_has_the_mean_of_all_its_steps(steps):
    series = {step: float(step) for step in range(1, steps + 1)}
    curve = binned([series])
    assert curve is not None
    size = curve.steps[0]
    assert len(curve.steps) <= MOST_POINTS
    for end, value in zip(curve.steps, curve.mean, strict=True):
        assert value == pytest.approx(np.mean([step for step in series if end - size < step <= end]))


def test_loads_and_shares_are_over_their_mean(folder):
    view = view_run(read_run(folder / "global-s0"), None)
    last = load_maps(view)[-1]
    counts_LE = np.array(view.loads[-1].counts)
    np.testing.assert_allclose(last.share, counts_LE / counts_LE.mean(-1, keepdims=True), atol=0.006)
    layers, share_LDE = domain_share(view, most_cells=2 * 6 * 16)
    assert layers == [0, 2]  # room for two of three
    counts_DE = np.array(view.evaluation.counts)[:, 2]
    np.testing.assert_allclose(share_LDE[1], counts_DE / counts_DE.mean(-1, keepdims=True), atol=0.006)


def test_metrics_of_single_layers_are_not_drawn(folder):
    names = training_metrics([read_run(folder / "global-s0")])
    assert names[:4] == ["loss", "lr", "grad_norm", "tokens_per_second"]
    assert "balance/maxvio_global" in names and not [name for name in names if "layer_" in name]


def test_layers_and_domains_have_the_mean_and_the_extremes_of_the_seeds(folder):
    views = [view_run(read_run(folder / f"global-s{seed}"), None) for seed in (0, 1)]
    found = charts(views, ["loss"])
    assert found.seeds == [0, 1]
    curve = found.by_layer["maxvio_global"]
    for layer in curve.steps:
        values = [one.evaluation.maxvio_global[layer] for one in views]
        assert (curve.low[layer], curve.high[layer]) == (min(values), max(values))
    score = [[sum(of[1] for of in one.evaluation.topk_score) / 6] for one in views]
    assert found.by_layer["topk_score"].mean[1] == pytest.approx(np.mean(score))
    assert set(found.domain_maxvio) == set(views[0].header.domains)
    curve = found.domain_maxvio["cpp"]
    for at, step in enumerate(curve.steps):
        seeds = []
        for one in views:
            counts_LE = next(e for e in one.evaluations if e.step == step).counts[2]
            seeds.append(sum(max(row) / (sum(row) / len(row)) - 1 for row in counts_LE) / len(counts_LE))
        assert (curve.low[at], curve.high[at]) == pytest.approx((min(seeds), max(seeds)))
        assert curve.mean[at] == pytest.approx(sum(seeds) / 2)


def test_groups_are_measured_in_the_recorded_loads_of_every_seed(folder):
    views = [view_run(read_run(folder / f"micro-s{seed}"), None) for seed in (0, 1)]
    grouping = Grouping(tuple(tuple(range(i, i + 4)) for i in range(0, 16, 4)), (0.25,) * 4)
    (found,) = charts(views, [], known=[grouping, Grouping(((0,), (1,)), (0.5, 0.5))]).groups  # one of two experts
    last = found.maxvio.steps[-1]
    seeds = []
    for one in views:
        (counts_LE,) = [load.counts for load in one.loads if load.step == last]
        excess = [max(sum(row[i : i + 4]) for i in range(0, 16, 4)) / (sum(row) / 4) - 1 for row in counts_LE]
        seeds.append(sum(excess) / len(excess))
    assert found.maxvio.mean[-1] == pytest.approx(sum(seeds) / 2)
    assert (found.maxvio.low[-1], found.maxvio.high[-1]) == pytest.approx((min(seeds), max(seeds)))
    row = views[0].loads[-1].counts[1]
    wanted = [sum(row[i : i + 4]) / (sum(row) / 4) for i in range(0, 16, 4)]
    assert found.share.share[1] == pytest.approx(wanted, abs=0.006)
