"""The sections of runs: which there are, and which are left out for want of data."""

from __future__ import annotations

from dataclasses import replace

from equipoise.report.data.curves import Charts
from equipoise.report.html.run_sections import run_facts, run_origin, run_sections
from equipoise.report.html.widgets import Widgets
from unit.report._parsed import drawn


def heads(comparison):
    widgets = Widgets()
    return [one.title for one in run_sections(comparison, widgets)], widgets


def test_all_sections_and_their_figures(comparison):
    found, widgets = heads(comparison)
    assert found[:4] == ["Held-out perplexity", "During training", "All numbers", "What the experts specialize in"]
    assert found[4:] == ["Load of every expert", "Layer by layer", "Domain by domain", "How true the gradient is"]
    drawn = ("perplexity", "training", "layers", "domain-loads", "estimators")
    assert set(widgets.figures) == {f"plot-{one}" for one in drawn}
    assert len(widgets.maps) == 2 * 4


def test_what_was_not_recorded_has_no_section(comparison):
    bare = [replace(one, charts=Charts(), layers={}, estimators=[]) for one in comparison.strategies]
    found, widgets = heads(replace(comparison, strategies=bare, domains=[]))
    assert found == ["Held-out perplexity", "During training", "All numbers", "Layer by layer"]
    assert widgets.figures == {} and widgets.maps == {}


def test_facts_and_origin(comparison):
    assert run_facts(comparison)[:2] == ["4 strategies × 2 seeds", "150 steps of 8,192 tokens"]
    assert run_facts(replace(comparison, strategies=comparison.strategies[:1]))[0] == "1 strategy × 2 seeds"
    origin = drawn(*run_origin(comparison))
    assert comparison.corpora[0] in origin and "torch 2.13.0" in origin and "micro, seed 0" in origin


def test_unlike_widths_have_a_section(comparison):
    used = [replace(comparison.strategies[0], load_by_width={4: 1.25, 12: 0.5}), *comparison.strategies[1:]]
    widgets = Widgets()
    sections = {one.title: one for one in run_sections(replace(comparison, strategies=used), widgets)}
    shown = drawn(*sections["Which widths are used"].parts)
    assert "1.25" in shown and "0.50" in shown and ">12<" in shown.replace(" ", "")
