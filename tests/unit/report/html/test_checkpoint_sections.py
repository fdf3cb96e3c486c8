"""The sections of checkpoints: curves, maps over layers and experts, a table; none for one checkpoint alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise.report import write_html
from equipoise.report.data.inspections import name_inspections
from equipoise.report.html import checkpoint_sections as sections
from equipoise.report.html.checkpoint_sections import checkpoint_sections
from equipoise.report.html.page import render_html
from equipoise.report.html.widgets import Widgets
from unit.report._browser import opened
from unit.report._parsed import HOSTILE, Page, drawn, renamed
from unit.report.synthetic_inspection import synthetic_checkpoints, synthetic_inspection

STEPS = (20, 100, 300)


@pytest.fixture(scope="module")
def found():
    return name_inspections(synthetic_checkpoints(STEPS))


def test_curves_maps_and_a_table_in_the_order_of_training(found):
    widgets = Widgets()
    measures, loads = checkpoint_sections(found[::-1], widgets)
    assert (measures.title, loads.title) == ("Through training", "Load of every expert through training")
    views = {view["label"]: view for view in widgets.figures["plot-checkpoints"]["views"]}
    line = next(trace for trace in views["MaxVio, sequence"]["data"] if "hovertemplate" in trace)
    assert line["x"] == list(STEPS)
    layers = [view for view in widgets.maps["map-checkpoint-layers-0"]["views"] if view["label"] == "MaxVio, all text"]
    wanted = [[round(one.inspection.layers[i].maxvio_global, 4) for one in found] for i in range(3)]
    assert layers[0]["z"] == wanted
    assert widgets.menus["checkpoint-layers"] == list(views)  # what no layer knows is in neither
    table = Page(drawn(measures.parts[-1]))
    rows = [attrs["data-value"] for tag, attrs in table.tags if tag == "th" and "data-value" in attrs]
    assert rows == ["20", "100", "300"]


def test_an_experts_load_is_over_the_mean_of_its_layer(found):
    widgets = Widgets()
    checkpoint_sections(found, widgets)
    shown = widgets.maps["map-checkpoint-loads-0"]
    assert shown["columns"] == ["20", "100", "300"] and len(shown["rows"]) == 16
    counts_CE = np.array([one.inspection.arrays.counts_DLE[:, 1].sum(0) for one in found])
    np.testing.assert_allclose(shown["views"][1]["z"], (counts_CE / counts_CE.mean(-1, keepdims=True)).T, atol=0.006)


def test_one_checkpoint_has_no_time(found):
    assert checkpoint_sections(found[:1], Widgets()) == []
    alone = Page(render_html(None, [found[0].inspection, synthetic_inspection(model="models/other")]))
    assert "Through training" not in alone.words


def test_a_deep_model_is_thinned(found, monkeypatch):
    monkeypatch.setattr(sections, "MOST_CELLS", 2 * 16 * len(STEPS))
    widgets = Widgets()
    checkpoint_sections(found, widgets)
    assert widgets.menus["checkpoint-loads"] == ["layer 0", "layer 2"]


def test_a_layer_without_tokens_is_told_from_an_even_one(found):
    inspections = [one.inspection for one in found]
    counts = inspections[1].arrays.counts_DLE.copy()
    counts[:, 0] = 0
    inspections[1] = replace(inspections[1], arrays=replace(inspections[1].arrays, counts_DLE=counts))
    widgets = Widgets()
    checkpoint_sections(name_inspections(inspections), widgets)
    assert {row[1] for row in widgets.maps["map-checkpoint-loads-0"]["views"][0]["z"]} == {None}


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_names_stay_text(hostile):
    pages = []
    for more in (" x", hostile):
        models = []
        for one in synthetic_checkpoints(STEPS):
            facts = replace(one.facts, step=int(one.facts.model.rpartition("-")[2]), model="models/tiny")
            models.append(renamed(replace(one, facts=facts), more))
        pages.append(Page(render_html(None, models)))
    assert pages[1].skeleton == pages[0].skeleton
    assert "Through training" in pages[1].words


def test_a_browser_draws_them(browser, tmp_path):
    path = write_html(None, tmp_path / "report.html", synthetic_checkpoints((1, 2, 3, 4, 5)))
    with opened(browser, path, wide=390) as page:
        assert page.locator("#plot-checkpoints svg.main-svg").count() >= 1
        assert page.inner_text("#plot-checkpoints + .under").startswith("Line: mean over the layers.")
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.focus("#map-checkpoint-loads-0")
        page.keyboard.press("ArrowRight")
        assert page.inner_text(".tip").startswith("expert 0, step 1: ")
