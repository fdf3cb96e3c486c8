"""The page in a real browser: it draws, asks the network for nothing, fits a phone, sorts, copies, and can be heard."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from equipoise.report import load_runs, summarize, write_html
from unit.report._browser import opened, until
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_checkpoints, synthetic_inspection

SPOKEN = "document.getElementById('spoken').textContent"
EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>%{x}"


@pytest.fixture(scope="module")
def desk(browser, page_of_all):
    """One page for the tests that leave each other alone: to draw one takes seconds."""
    with opened(browser, page_of_all, permissions=["clipboard-read", "clipboard-write"]) as page:
        yield page


@pytest.mark.parametrize(("wide", "scheme"), [(1200, "light"), (1200, "dark"), (390, "light"), (390, "dark")])
def test_everything_is_drawn_and_nothing_is_asked_for(browser, page_of_all, wide, scheme):
    with opened(browser, page_of_all, wide=wide, scheme=scheme, has_touch=wide < 500) as page:
        assert page.locator(".plot svg.main-svg").count() >= 5
        assert page.locator(".plot:not(:has(svg))").count() == 0
        assert page.locator(".map").count() == 8 + 4 * 2
        blank = """[...document.querySelectorAll('.map canvas')].filter((canvas) => {
            const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            return new Set(new Uint32Array(pixels.buffer)).size < 10; }).length"""
        assert page.evaluate(blank) == 0
        assert page.evaluate("document.documentElement.scrollWidth") == wide  # a phone need not scroll sideways
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 24)"
        assert dark == (scheme == "dark")
        line = page.evaluate("document.getElementById('plot-perplexity').data.at(-1).line.color")
        assert line == {"light": "#0b8a72", "dark": "#3fc4a6"}[scheme]


def test_chips_and_schemes_change_what_is_drawn(browser, page_of_all):
    with opened(browser, page_of_all) as page:
        names = "document.getElementById('plot-training').data.map((one) => one.name).filter(Boolean)"
        assert "global" in page.evaluate(names)
        page.click(".chip[data-strategy='1'] >> nth=0")
        assert "global" not in page.evaluate(names)
        assert page.locator(".chip[data-strategy='1'][aria-pressed=false]").count() == 4
        page.emulate_media(color_scheme="dark")
        color = "document.getElementById('plot-perplexity').data.at(-1).line.color"
        until(page, color, "#3fc4a6")
        page.emulate_media(color_scheme="dark", media="print")  # paper is white
        until(page, color, "#0b8a72")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.locator(".copies >> visible=true").count() == 0


def test_the_slider_goes_through_time_and_arrow_keys_through_cells(desk, comparison):
    page = desk
    loads = comparison["global"].charts.loads
    page.focus("input[data-menu=loads]")
    page.keyboard.press("Home")
    assert page.get_attribute("input[data-menu=loads]", "aria-valuetext") == f"step {loads[0].step}"
    page.keyboard.press("ArrowRight")
    page.focus("#map-loads-1")
    for key in ("ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"):
        page.keyboard.press(key)
    said = float(f"{loads[1].share[2][2]:.3g}")
    until(page, SPOKEN, f"layer 2, expert 2: {said:g} × even")
    assert page.inner_text(".tip") == page.evaluate(SPOKEN)
    page.keyboard.press("End")
    page.keyboard.press("PageUp")
    until(page, f"{SPOKEN}.startsWith('layer 0, expert 15: ')", True)
    page.keyboard.press("Escape")
    assert page.is_hidden(".tip")


def test_tables_sort_and_copy(desk, comparison):
    page = desk
    table = "table[data-table=domains]"
    first = f"{table} tbody tr:first-child th"
    page.focus(f"{table} thead th:nth-child(3) button")
    page.keyboard.press("Enter")  # by the perplexity of global, the highest first
    values = {name: one.mean for name, one in comparison["global"].domain_perplexity.items()}
    assert page.inner_text(first) == max(values, key=lambda name: values[name])
    assert page.get_attribute(f"{table} thead th:nth-child(3)", "aria-sort") == "descending"
    page.keyboard.press("Enter")
    assert page.inner_text(first) == min(values, key=lambda name: values[name])
    page.click(f"{table} thead th:first-child button")
    assert page.locator(f"{table} [aria-sort=ascending]").count() == 1
    assert page.locator(f"{table} tbody th").all_inner_texts() == sorted(values)
    page.click(f".wide:has({table}) + .copies button >> nth=0")
    until(page, f"{SPOKEN}.startsWith('Copied 6 rows as CSV')", True)
    rows = list(csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
    assert rows[0] == ["Domain", *(one.name for one in comparison.strategies)]
    assert {row[0]: float(row[2]) for row in rows[1:]} == values  # every digit of them
    page.click(f".wide:has({table}) + .copies button >> nth=1")
    until(page, f"{SPOKEN}.startsWith('Copied 6 rows as Markdown')", True)
    lines = page.evaluate("navigator.clipboard.readText()").splitlines()
    assert lines[1] == "|---|---|---|---|---|"
    assert len(lines) == 8
    page.focus("input[data-menu=loads]")
    page.keyboard.press("End")
    page.click("#map-loads-1 + .copies button")
    until(page, f"{SPOKEN}.startsWith('Copied the map')", True)
    rows = list(csv.reader(io.StringIO(page.evaluate("navigator.clipboard.readText()"))))
    assert [float(cell) for cell in rows[1][1:]] == comparison["global"].charts.loads[-1].share[0]


def test_a_screen_reader_finds_its_way(desk):
    page = desk
    nameless = """[...document.querySelectorAll('button, select, input, [tabindex="0"]')].filter((one) =>
        !(one.textContent.trim() || one.getAttribute('aria-label') || one.closest('label')?.textContent)).length"""
    assert page.evaluate(nameless) == 0
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((one) => one.id)")
    assert len(set(ids)) == len(ids)
    assert page.locator("main, nav, footer, h1").count() == 4
    assert page.locator("section:not([aria-labelledby])").count() == 0
    heads = page.locator("nav a").all_inner_texts()
    assert len(heads) == page.locator("main h2").count() > 12
    assert page.locator("th:not([scope])").count() == 0
    page.evaluate("document.activeElement.blur(); getSelection().removeAllRanges(); scrollTo(0, 0)")
    page.focus(".skip")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "content"
    page.focus("nav a >> nth=0")
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) != "none"


def test_names_that_attack_are_text(browser, tmp_path):
    names = [EVIL, "</script>", "x" * 90, "\u202eabc", "עברית", "json"]
    for number, name in enumerate(("micro", EVIL)):
        write_run(tmp_path / str(number), header(name, 0, steps=20, domains=names))
    evil = synthetic_inspection(names=names, layers=2, experts=8, model=EVIL)
    layers = [replace(one, name=EVIL, maxvio_global=float("nan"), entropy_token=float("nan")) for one in evil.layers]
    strings = {key: ("\u202e", "</script>", EVIL, "\x00", "שלום", "\u2028", "\ud800")[key % 7] for key in evil.strings}
    evil = replace(evil, layers=layers, strings=strings, problems=[EVIL])
    path = write_html(summarize(load_runs([tmp_path])[0]), tmp_path / "report.html", [evil, evil])
    with opened(browser, path, wide=390) as page:
        page.hover("#map-domains-1 canvas")
        page.hover(".token >> nth=3")
        assert page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert "<script>alert(1)</script>" in page.inner_text("h1")
        assert "<script>alert(1)</script>" in page.inner_text(".tokens")
        assert "\\u202e" in page.inner_text(".tokens")
        assert not {"\u202e", "\u2028", "\x00"} & set(page.inner_text("body"))


@pytest.mark.parametrize("strategies", [3, 7])
def test_on_a_phone_the_numbers_stand_under_their_strategies(browser, tmp_path, strategies):
    """Scrolled to the last row, the names of few columns are in sight above it; of many, each value has its own."""
    for number in range(strategies):
        write_run(tmp_path / str(number), header(f"strategy{number}", 0, steps=20))
    path = write_html(summarize(load_runs([tmp_path])[0]), tmp_path / "report.html")
    with opened(browser, path, wide=390) as page:
        last = page.locator("table[data-table=numbers] tbody tr >> nth=-1")
        last.scroll_into_view_if_needed()
        if strategies > 4:
            named = last.locator("td[data-of]").evaluate_all(
                "all => all.map(one => getComputedStyle(one, '::before').content)"
            )
            assert named == [f'"strategy{number}"' for number in range(strategies)]
            return
        names = page.locator("table[data-table=numbers] thead th:visible")
        boxes = [names.nth(n).bounding_box() for n in range(names.count())]
        assert len(boxes) == strategies and all(box and 0 <= box["y"] < page.viewport_size["height"] for box in boxes)


PLACES = """(name) => {
    const table = document.querySelector(`table[data-table=${name}]`), box = table.parentElement;
    if (table.closest("details")) table.closest("details").open = true;
    [box.scrollLeft, box.scrollTop] = [1e4, 1e4];
    box.scrollIntoView({ block: "center" });
    const [row, column] = [[...table.rows].at(-1).cells[0], [...table.tHead.rows[0].cells].at(-1)];
    const seen = (one) => {
        const { left, right, top, bottom } = one.getBoundingClientRect();
        return one.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2)); };
    return [box.scrollLeft > 0, seen(row), seen(column)]; }"""


@pytest.mark.parametrize("name", ["layers-0", "alike", "runs"])
def test_on_a_phone_the_names_of_rows_and_columns_stay_in_sight(browser, page_of_all, name):
    """Of a table that is scrolled to its last cell, the last row's name and the last column's are not covered."""
    with opened(browser, page_of_all, wide=390, has_touch=True) as page:
        assert page.evaluate(PLACES, name) == [True, True, True]


def test_without_scripts_the_numbers_remain(browser, page_of_all):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(page_of_all.as_uri())
    assert "What it means" in page.inner_text("table.stack >> nth=0")
    assert "never chosen" in page.inner_text("table[data-table=alike]")
    context.close()


@pytest.mark.parametrize("checkpoints", [1, 4])
def test_the_largest_inspection_opens_in_seconds_and_stays_under_8_megabytes(browser, tmp_path, checkpoints):
    """One of 48 layers × 128 experts × 12 domains, or four checkpoints of it."""
    sizes = {"domains": 12, "layers": 48, "experts": 128, "top_k": 8, "passages": 2, "passage_length": 256}
    steps = range(1000, 1000 * checkpoints + 1, 1000)
    path = write_html(None, tmp_path / "report.html", synthetic_checkpoints(steps, **sizes))
    assert path.stat().st_size < 8e6
    with opened(browser, path) as page:
        ready = page.evaluate("performance.getEntriesByType('navigation')[0].domComplete")
        assert ready < 20_000  # milliseconds; one or two where nobody else works
        menu = "inspected-domains" if checkpoints == 1 else "checkpoint-loads"
        slider = page.locator(f"input[data-menu={menu}]")
        assert slider.get_attribute("max") == "47"  # all layers are there
        slowest = page.evaluate(
            """(menu) => {
            const slider = document.querySelector(`input[data-menu=${menu}]`), began = performance.now();
            for (slider.value = 0; slider.value < 47; slider.value++) slider.dispatchEvent(new Event('input'));
            return (performance.now() - began) / 48; }""",
            menu,
        )
        assert slowest < 200  # milliseconds from one layer to the next
