"""The building blocks of the page: any text is safe in them, and a choice of one is no menu."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.report.html.widgets import Widgets, breakable, cell, dot, safe, section, table


class Read(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.values = [], "", []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [value for name, value in attrs if name in ("data-value", "aria-label")]

    def handle_data(self, data):
        self.text += data


printable = st.text(st.characters(codec="ascii", min_codepoint=32, max_codepoint=126))


@given(printable)
def test_any_text_stays_text(text):
    found = Read(cell(safe(text), text) + f"<p>{breakable(text)}</p>")
    assert set(found.tags) <= {"td", "p", "wbr"}
    assert found.text == text * 2 and found.values == [text]


@given(st.text())
def test_control_characters_do_not_reach_the_page(text):
    assert not {"\x00", "\x1b", "\u202e", "\u2028"} & set(safe(text))


def test_colours_repeat_after_the_eighth_but_not_the_baselines():
    assert [dot(i)[-4:-2] for i in (0, 7, 8, 14, 15)] == ["s0", "s7", "s1", "s7", "s1"]


def test_a_table_labels_its_heads_and_keeps_its_rows():
    found = table("runs", "the runs", ["A<", "B"], [cell("1") + cell("2"), cell("3") + cell("4")], left=(1,))
    assert Read(found).tags.count("tr") == 3 and found.count('scope="col"') == 2
    assert "A&lt;" in found and found.count("class=left") == 1


def test_a_section_is_named_by_its_heading():
    assert '<section aria-labelledby="all-numbers"><h2 id="all-numbers" tabindex="-1">All numbers' in section(
        "All numbers", "", ""
    )


@pytest.mark.parametrize("kind", ["select", "slider"])
def test_a_menu_over_one_label_is_not_shown_but_known(kind):
    widgets = Widgets()
    assert getattr(widgets, kind)("loads", ["step 1"], "Show") == ""
    assert widgets.menus == {"loads": ["step 1"]}
    shown = getattr(widgets, kind)("loads", ["step 1", "step <2>"], "Show")
    assert 'data-menu="loads"' in shown and "<2>" not in shown
    assert widgets.menus == {"loads": ["step 1", "step <2>"]}


def test_figures_are_collected_under_the_names_that_the_page_uses():
    widgets = Widgets()
    line = widgets.lines("training", {"views": [], "height": 300}, "a <b>")
    panels = widgets.panels("loads", "Loads", [("micro", 0, {"views": [{"z": [[1]]}]}), ("none", 1, None)])
    assert 'id="plot-training"' in line and "a &lt;b&gt;" in line and list(widgets.figures) == ["plot-training"]
    assert 'id="map-loads-0"' in panels and "Nothing recorded." in panels and list(widgets.maps) == ["map-loads-0"]
