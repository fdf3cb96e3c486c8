"""The sections of inspections: which there are for one domain or many, one model or several."""

from __future__ import annotations

from equipoise.report.data.inspections import name_inspections
from equipoise.report.html.inspection_sections import inspection_cards, inspection_origin, inspection_sections
from equipoise.report.html.widgets import Widgets
from unit.report._parsed import Page, drawn
from unit.report.synthetic_inspection import synthetic_inspection


def heads(inspections):
    widgets = Widgets()
    made = inspection_sections(name_inspections(inspections), widgets)
    text = "".join(one.lead + drawn(*one.parts) for one in made)
    return [one.title for one in made], widgets, text


def test_all_sections_and_their_maps(inspections):
    found, widgets, text = heads(inspections)
    assert found == ["Which expert reads which domain", "Inspected layer by layer", "By domain and layer",
                     "Experts that domains share", "Experts chosen together", "Dead and redundant experts",
                     "What one expert reads", "The text, coloured by expert"]  # fmt: skip
    assert len(widgets.maps) == 4 * 2
    assert text.count("<details") == 2  # the layers of each
    view = widgets.maps["map-inspected-domains-0"]["views"][1]
    wanted = inspections[0].frequency_DLE()[:, 1] * 16 / 2
    assert view["z"][2][0] == round(float(wanted[2, view["columns"][0]]), 2)


def test_one_domain_shares_nothing_and_top_1_chooses_no_pairs():
    found, widgets, _ = heads([synthetic_inspection(names=["only"], top_k=1)])
    assert "Experts that domains share" not in found and "Experts chosen together" not in found
    assert not [name for name in widgets.maps if "shared" in name or "pairs" in name]


def test_a_deep_model_is_thinned_and_says_so(monkeypatch):
    deep = synthetic_inspection(layers=12, experts=8, domains=2)
    monkeypatch.setattr("equipoise.report.html.inspection_sections.MOST_DOMAIN_CELLS", 4 * 2 * 8)
    _, widgets, text = heads([deep])
    assert "4 of 12 layers are shown." in text
    assert [one["label"] for one in widgets.maps["map-inspected-domains-0"]["views"]] == [
        f"layer {i}" for i in (0, 4, 7, 11)
    ]


def test_cards_and_origin_name_each_model(inspections):
    named = name_inspections(inspections)
    assert drawn(("cards", {"cards": inspection_cards(named)})).count("<article") == 2
    words = Page(drawn(inspection_origin(named))).words
    assert "models/early" in words.replace("/ ", "/") and "0.13 M" in words
