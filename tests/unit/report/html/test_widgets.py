"""The building blocks of the page: a choice of one is no menu, tables label their heads, figures are collected."""

from __future__ import annotations

import pytest

from equipoise.report.html.rendering import environment
from equipoise.report.html.widgets import Cell, Section, Widgets, table
from unit.report._parsed import Page, drawn


def test_colours_repeat_after_the_eighth_but_not_the_baselines():
    dot = environment().get_template("parts.html.jinja").module.dot
    assert [dot(i)[-4:-2] for i in (0, 7, 8, 14, 15)] == ["s0", "s7", "s1", "s7", "s1"]


def test_a_table_labels_its_heads_and_keeps_its_rows():
    cells = [[Cell("a"), Cell("b<", 2)], [Cell("c", colour=1), Cell(codes=["d", "e"])]]
    found = Page(drawn(table("runs", "the runs", ["A<", "B"], cells, left=(1,))))
    tags = [tag for tag, _ in found.tags]
    assert tags.count("tr") == 3 and tags.count("th") == 4 and tags.count("td") == 2 and tags.count("code") == 2
    assert [attrs["scope"] for tag, attrs in found.tags if tag == "th"] == ["col", "col", "row", "row"]
    assert [tag for tag, attrs in found.tags if attrs.get("class") == "left"] == ["th", "td", "td"]
    assert [attrs["data-value"] for _, attrs in found.tags if "data-value" in attrs] == ["2"]
    assert found.words == "A< B a b< c d e"


def test_a_section_is_named_by_its_heading():
    show = environment().get_template("macros.html.jinja").module.show
    page = Page(show(Section("All numbers", "Means\nof all"), {}))
    (_, landmark), (_, heading), (tag, _) = page.tags
    assert landmark["aria-labelledby"] == heading["id"] == "all-numbers" and tag == "p"
    assert page.words == "All numbers Means of all"


@pytest.mark.parametrize("slides", [True, False])
def test_a_menu_over_one_label_is_not_shown_but_known(slides):
    widgets = Widgets()
    for labels in (["step 1"], ["step 1", "step <2>"]):
        page = Page(drawn(widgets.panels("loads", "Loads", labels, [], slides=slides)))
        shown = [tag for tag, attrs in page.tags if attrs.get("data-menu") == "loads"]
        assert shown == ([] if len(labels) < 2 else ["input" if slides else "select"])
        assert widgets.menus == {"loads": labels}
    assert "step <2>" in page.words


def test_figures_are_collected_under_the_names_that_the_page_uses():
    widgets = Widgets()
    line = drawn(widgets.lines("training", "a <b>", {"views": [], "height": 300}))
    figure = {"views": [{"z": [[1]]}]}
    panels = drawn(widgets.panels("loads", "Loads", [], [("micro", "seed 0", 0, figure), ("none", "", 1, None)]))
    assert 'id="plot-training"' in line and "a &lt;b&gt;" in line and list(widgets.figures) == ["plot-training"]
    assert 'id="map-loads-0"' in panels and "Nothing recorded." in panels and list(widgets.maps) == ["map-loads-0"]
