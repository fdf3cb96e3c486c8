"""The data of the charts: means over seeds, bins of noisy series, and limits that keep a page small."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.data.curves import MOST_POINTS, binned, domain_share, join, load_maps, thin, training_metrics
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
