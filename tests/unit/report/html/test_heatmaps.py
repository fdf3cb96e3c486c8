"""Heat maps as data: cells that are not finite, the top of the scale, the order of experts."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.report import load_runs, summarize
from equipoise.report.html.heatmaps import by_domain, domain_maps, group_maps, heat_map, load_maps, top_of, view
from equipoise.storage.run_record import read_run
from unit.report.synthetic import header, write_run


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


def test_experts_of_a_group_stand_side_by_side_between_borders(tmp_path):
    scattered = "AuxLoss(groups=((3, 0, 9, 7), (1, 2, 4, 5, 6, 8, 10, 11, 12, 13, 14, 15)))"
    for number, policy in enumerate(("AuxLoss(groups=4)", scattered, "AuxLoss()")):
        write_run(tmp_path / str(number), header(f"s{number}", 0, steps=20, policies=[policy]))
    comparison = summarize(load_runs([tmp_path])[0])
    _, (plain, ordered, other) = load_maps(comparison)
    assert plain["borders"] == other["borders"] == [4, 8, 12] and "columns" not in plain["views"][-1]
    order = ordered["views"][-1]["columns"]
    assert ordered["borders"] == [4] and order[:4] == [3, 0, 9, 7] and ordered["column"] == "experts, group by group"
    counts = np.array(read_run(tmp_path / "1").loads[-1].counts)
    wanted = (counts / counts.mean(-1, keepdims=True))[:, order]
    np.testing.assert_allclose(ordered["views"][-1]["z"], wanted, atol=0.006)
    labels, maps = group_maps(comparison)
    assert labels == ["4 groups of 4 experts", "2 groups of 4 to 12 experts"]
    counts = np.array(read_run(tmp_path / "2").loads[-1].counts)
    wanted = counts[:, [3, 0, 9, 7]].sum(-1) / (counts.sum(-1) * 4 / 16)
    np.testing.assert_allclose(np.array(maps[2]["views"][1]["z"])[:, 0], wanted, atol=0.006)


def test_without_groups_there_are_no_borders(comparison):
    assert not any("borders" in one for one in load_maps(comparison)[1])
    assert group_maps(comparison) == ([], [None] * 4)
