"""The page in a real browser: it draws, asks the network for nothing, and fits a phone."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest

from equipoise.report import load_runs, summarize, write_html
from report.synthetic import header, write_run

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def report(comparison, tmp_path_factory):
    return write_html(comparison, tmp_path_factory.mktemp("page") / "report.html")


def open_page(browser, path, *, wide: int = 1200, scheme: str = "light", **options):
    """The page, once drawn, and all that it complained of or asked for."""
    page = browser.new_page(viewport={"width": wide, "height": 900}, color_scheme=scheme, **options)
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_selector("html[data-drawn=yes]")
    return page, complaints


@pytest.mark.parametrize(("wide", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_everything_is_drawn_and_nothing_is_asked_for(browser, report, wide, scheme):
    page, complaints = open_page(browser, report, wide=wide, scheme=scheme, has_touch=wide < 500)
    assert complaints == []
    assert page.locator(".plot svg.main-svg").count() >= 12
    assert page.locator(".plot:not(:has(svg))").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == wide  # a phone need not scroll sideways
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
    assert dark == (scheme == "dark")
    line = page.evaluate("document.getElementById('plot-perplexity').data.at(-1).line.color")
    assert line == {"light": "#0b8a72", "dark": "#3fc4a6"}[scheme]
    page.close()


def test_menus_and_chips_change_what_is_drawn(browser, report):
    page, complaints = open_page(browser, report)
    cells = "document.getElementById('plot-domains-1').data[0].z[0]"
    before = page.evaluate(cells)
    page.select_option("select[data-menu=domains]", "layer 0")
    assert page.evaluate(cells) != before
    names = "document.getElementById('plot-training').data.map((one) => one.name).filter(Boolean)"
    assert "global" in page.evaluate(names)
    page.click(".chip[data-strategy='1'] >> nth=0")
    assert "global" not in page.evaluate(names)
    assert page.locator(".chip[data-strategy='1'][aria-pressed=false]").count() == 3
    page.emulate_media(color_scheme="dark")
    color = "document.getElementById('plot-perplexity').data.at(-1).line.color"
    for _ in range(100):  # wait_for_function would evaluate text, which the page forbids itself
        if page.evaluate(color) == "#3fc4a6":
            break
        page.wait_for_timeout(50)
    assert page.evaluate(color) == "#3fc4a6"
    assert complaints == []
    page.close()


def test_names_that_attack_are_text(browser, tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>%{x}"
    for number, name in enumerate(("micro", evil)):
        head = header(name, 0, steps=20, domains=[evil, "</script>", "x" * 90, "\u202eabc", "日本語", "json"])
        write_run(tmp_path / str(number), head)
    path = write_html(summarize(load_runs([tmp_path])[0]), tmp_path / "report.html")
    page, complaints = open_page(browser, path, wide=390)
    page.hover("#plot-domains-1")
    assert complaints == []
    assert page.locator("img").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert "<script>alert(1)</script>" in page.inner_text("h1")
    page.close()


def test_without_scripts_the_numbers_remain(browser, report):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(report.as_uri())
    assert "What it means" in page.inner_text("table.stack >> nth=0")
    context.close()
