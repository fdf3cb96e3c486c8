"""Figures as files: each is an SVG that stands alone, in a browser and for a strict reader of XML."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest

from equipoise.errors import ConfigError
from equipoise.report import load_runs, summarize
from equipoise.report.export.notebook import DARK, LIGHT
from equipoise.report.export.svg import write_svg
from equipoise.report.html.page import render_html
from unit.report._browser import needs_chromium, opened
from unit.report._parsed import EVIL, Page
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_inspection

NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
SVG = "{http://www.w3.org/2000/svg}"
BOXES = """[...document.querySelectorAll('text')].map((one) => one.getBoundingClientRect())
    .filter((one) => one.width).map(({ left, right, top, bottom }) => [left, right, top, bottom])"""
pytestmark = needs_chromium


@pytest.fixture(scope="module")
def made(page_of_all, tmp_path_factory):
    pytest.importorskip("playwright", reason="needs playwright")
    return write_svg(page_of_all.read_text(encoding="utf-8"), tmp_path_factory.mktemp("figures"))


def words(path):
    return [text for text in ("".join(node.itertext()).strip() for node in ET.parse(path).iter(f"{SVG}text")) if text]


def test_every_figure_of_the_page_is_a_file(made, page_of_all):
    page = Page(page_of_all.read_text(encoding="utf-8"))
    assert len(made) == len(page.data["figures"]) + len(page.data["maps"])
    assert made[0].name == "01-held-out-perplexity-mean-of-all-domains.svg"
    assert [int(path.name[:2]) for path in made] == list(range(1, len(made) + 1))


def test_each_stands_alone(made):
    """No script, no style sheet, no variable, nothing from elsewhere: `url()` only leads to what is inside."""
    for path in made:
        text = path.read_text(encoding="utf-8")
        root = ET.fromstring(text)
        assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title").text
        tags = {node.tag.removeprefix(SVG) for node in root.iter()}
        assert not tags & {"script", "style", "image", "foreignObject", "use", "a"}, path
        assert "var(" not in text and "currentColor" not in text and "@import" not in text
        assert set(re.findall(r"https?://[^\"' ]+", text)) <= NAMESPACES
        ids = {node.get("id") for node in root.iter()}
        assert set(re.findall(r"url\([\"'#]*([^\"')]+)", text.replace("&quot;", ""))) <= ids
        assert "font-family" in root.attrib


def test_it_says_what_the_page_says(made, comparison):
    first, training = made[0], made[1]
    said = words(first)
    assert said[:2] == ["Held-out perplexity", "Mean of all domains"]
    assert {f"{one.name}, n = 2" for one in comparison.strategies} <= set(said)
    assert "Line: mean over the seeds. Band: from the lowest seed to the highest." in said
    assert "uniform random routing" in words(training)
    fills = {node.get("stroke") for node in ET.parse(first).iter(f"{SVG}path")}
    assert {LIGHT[f"s{i}"] for i in range(4)} <= fills


def test_a_map_has_a_path_of_each_colour_and_its_scale(made, comparison):
    (path,) = [path for path in made if path.name.endswith("load-of-every-expert-global-seed-0-step-150.svg")]
    said = words(path)
    assert {"layer", "expert", "0", "15", "1 = even", "step 150"} <= set(said)
    boxes = sum(node.get("d", "").count("M") for node in ET.parse(path).iter(f"{SVG}path"))
    assert boxes == 3 * 16
    assert comparison["global"].charts.loads[-1].step == 150


def test_a_dark_page_gives_dark_figures(tmp_path):
    pytest.importorskip("playwright", reason="needs playwright")
    run = write_run(tmp_path / "run", header("micro", 0, steps=20))
    made = write_svg(render_html(summarize(load_runs([run])[0])), tmp_path / "svg", scheme="dark")
    assert {ET.parse(path).find(f"{SVG}rect").get("fill") for path in made} == {DARK["paper"]}


def test_a_browser_opens_it_by_itself(browser, made):
    context = browser.new_context(viewport={"width": 900, "height": 700})
    page = context.new_page()
    for path in (made[0], made[-1]):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.tagName") == "svg"
        root = ET.parse(path).getroot()
        for left, right, top, bottom in page.evaluate(BOXES):  # no label is cut off
            assert left >= 0 and right <= float(root.get("width"))
            assert top >= 0 and bottom <= float(root.get("height"))
    context.close()


def test_the_button_saves_what_is_shown(browser, page_of_all):
    with opened(browser, page_of_all, accept_downloads=True) as page:
        page.select_option("select[data-menu=training]", label="Gradient norm")
        page.click("section[aria-labelledby=during-training] .chip[data-strategy='1']")
        with page.expect_download() as download:
            page.click("#plot-training ~ .copies button >> nth=1")
        assert download.value.suggested_filename == "during-training-gradient-norm.svg"
        said = words(download.value.path())
        assert "Gradient norm" in said and "micro, n = 2" in said and "global, n = 2" not in said
        with page.expect_download() as download:
            page.click("#map-loads-1 + .copies button >> nth=1")
        assert "Load of every expert: global, seed 0" in words(download.value.path())


def test_names_that_attack_are_text(tmp_path):
    pytest.importorskip("playwright", reason="needs playwright")
    domains = [EVIL, "</text>", "]]>", "a\x00b", "&amp;", "\ud800"]
    for number, name in enumerate(("micro", EVIL)):
        write_run(tmp_path / str(number), header(name, 0, steps=20, domains=domains))
    evil = synthetic_inspection(names=domains, layers=2, experts=8, model=EVIL)
    evil = replace(evil, layers=[replace(one, name=EVIL) for one in evil.layers])
    made = write_svg(render_html(summarize(load_runs([tmp_path])[0]), [evil, evil]), tmp_path / "svg")
    for path in made:
        assert path.parent == tmp_path / "svg" and re.fullmatch(r"\d\d-[a-z0-9.-]+\.svg", path.name)
        tags = {node.tag.removeprefix(SVG) for node in ET.parse(path).iter()}
        assert not tags & {"script", "img", "a", "image"}
    assert any("<script>alert(1)</script>" in text for path in made for text in words(path))


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "here").write_text("")
    for place in (tmp_path / "a.svg", tmp_path / "here"):
        with pytest.raises(ConfigError, match="a folder for --svg"):
            write_svg("<html>", place)
