"""Heat maps as data: cells that are not finite, the top of the scale, the order of experts."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.report.html.heatmaps import by_domain, domain_maps, heat_map, load_maps, top_of, view


def test_nothing_to_draw_is_none_and_names_are_escaped():
    assert heat_map([], ["a"], top=2.0, row="layer") is None
    made = heat_map([view("x\x1b", [[1.0]])], ["a\u202e"], top=2.0, row="layer", columns=["\x00"])
    assert made is not None
    assert (made["rows"], made["columns"], made["views"][0]["label"]) == (["a\\u202e"], ["\\x00"], "x\\x1b")


@pytest.mark.parametrize(("hot", "top"), [(1, 2.0), (30, 50.0)])
def test_a_single_hot_cell_does_not_set_the_scale(hot, top):
    cells = np.ones(1000)
    cells[:hot] = 50.0
    cells[5, ...] = np.nan
    assert top_of([cells.reshape(10, 100)]) == top
    assert top_of([], 1.0) == 1.0


def test_experts_are_ordered_by_the_domain_that_favours_them():
    share_DE = np.array([[0.5, 3.0, 1.0, 2.0], [2.0, 0.5, 1.5, 0.1]])
    found = by_domain("layer 0", share_DE)
    assert found["columns"] == [1, 3, 0, 2]
    assert found["z"] == share_DE[:, [1, 3, 0, 2]].tolist()


def test_every_strategy_has_a_map_for_every_stop_of_the_slider(comparison):
    labels, maps = load_maps(comparison)
    assert labels[-1] == "step 150" and len(maps) == 4
    assert all(one is not None and len(one["views"]) == len(labels) for one in maps)
    labels, maps = domain_maps(comparison)
    assert labels == ["layer 0", "layer 1", "layer 2"]
    assert all(one is not None and one["rows"] == comparison.domains for one in maps)
