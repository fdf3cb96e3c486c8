"""The text view, what an expert reads, and a page that refreshes itself, by keyboard in a real browser."""

from __future__ import annotations

import pytest

from equipoise.report import load_runs, summarize, write_html
from unit.report._browser import opened, until
from unit.report.synthetic import header, write_run

SPOKEN = "document.getElementById('spoken').textContent"


@pytest.fixture(scope="module")
def phone(browser, page_of_all):
    """One page for the tests that leave each other alone: to draw one takes seconds."""
    with opened(browser, page_of_all, wide=390) as page:
        yield page


@pytest.fixture(autouse=True)
def from_the_beginning(request):
    """The first passage and layer, where a test before has gone elsewhere."""
    yield
    if "phone" in request.fixturenames:
        page = request.getfixturevalue("phone")
        for number in (0, 1):
            page.locator("#passages select").nth(number).select_option(index=0)
        page.locator("#passages input[type=range]").fill("0")


def heard(page) -> str:
    """What a screen reader says of the token that has the keyboard."""
    current = page.get_attribute(".tokens", "aria-activedescendant")
    return page.get_attribute(f"#{current}", "aria-label")


def test_text_is_read_token_by_token_with_all_experts(phone, inspections):
    arrays, strings = inspections[0].arrays, inspections[0].strings

    def wanted(index: int, layer: int) -> str:
        text = strings[int(arrays.passage_ids_NS[0, index])].replace("\n", "⏎").replace("\t", "⇥")
        return f"{text}: expert {', '.join(map(str, arrays.passage_experts_NSLK[0, index, layer]))}"

    page = phone
    page.focus(".tokens")
    assert heard(page) == wanted(0, 0)
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert heard(page) == wanted(5, 0)
    page.keyboard.press("+")  # the next layer, same token
    assert heard(page) == wanted(5, 1)
    until(page, SPOKEN, f"layer 1: expert {', '.join(map(str, arrays.passage_experts_NSLK[0, 5, 1]))}")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("End")
    assert heard(page) == wanted(63, 1)
    first = int(arrays.passage_experts_NSLK[0, 63, 1, 0])
    page.keyboard.press("Enter")
    lit = int((arrays.passage_experts_NSLK[0, :, 1] == first).any(-1).sum())
    until(page, SPOKEN, f"expert {first} lit, {lit} tokens")
    assert page.locator(".token[aria-selected=true]").count() == lit
    page.keyboard.press("Escape")
    assert page.locator(".token.off").count() == 0
    numbers = page.locator(".token sub").all_inner_texts()  # colour is never alone
    assert numbers == [str(one) for one in arrays.passage_experts_NSLK[0, :, 1, 0]]


def test_pointer_and_menus_of_the_text(phone, inspections):
    arrays = inspections[0].arrays
    page = phone
    page.hover(".token >> nth=7")
    ids = arrays.passage_experts_NSLK[0, 7, 0]
    assert f"expert {ids[0]}, then {ids[1]}" in page.inner_text(".told")
    text = page.inner_text(".tokens")
    page.locator("#passages select").nth(1).select_option(index=1)
    assert page.inner_text(".tokens") != text
    page.locator("#passages select").nth(0).select_option("blunt")
    slider = page.locator("#passages input[type=range]")
    assert slider.get_attribute("max") == "1"  # this model has two layers


def test_tokens_are_told_apart_on_their_colours(phone):
    """Contrast of text and number to every expert's colour, light and dark, as WCAG computes it."""
    worst = """() => {
        const shine = (text) => text.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
            .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4))
            .reduce((sum, one, at) => sum + one * [0.2126, 0.7152, 0.0722][at], 0);
        const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        return Math.min(...[...document.querySelectorAll('.token')].flatMap((token) => {
            const ground = shine(getComputedStyle(token).backgroundColor);
            return [token, token.lastChild].map((part) => ratio(ground, shine(getComputedStyle(part).color))); })); }"""
    for scheme, expected in (("light", "rgb(27, 29, 33)"), ("dark", "rgb(232, 233, 235)")):
        phone.emulate_media(color_scheme=scheme)
        until(phone, "getComputedStyle(document.body).color", expected)
        assert phone.evaluate(worst) >= 4.5, scheme
    phone.emulate_media(color_scheme="light")


def test_what_an_expert_reads(phone, inspections):
    one = inspections[0]
    page = phone
    page.fill("#vocabulary input[type=number]", "5")
    page.keyboard.press("Tab")
    rows = page.locator("#vocabulary tbody tr")
    assert rows.count() == 4
    for j in range(4):
        token = one.strings[int(one.arrays.top_ids_LEJ[0, 5, j])].replace("\n", "⏎").replace("\t", "⇥")
        assert rows.nth(j).locator("th bdi").text_content() == token
        assert rows.nth(j).locator("mark").count() in (0, 1)
        share = one.arrays.top_id_counts_LEJ[0, 5, j] / one.arrays.top_id_seen_LEJ[0, 5, j]
        assert float(rows.nth(j).locator("td").nth(1).get_attribute("data-value")) == pytest.approx(share, abs=1e-4)
    page.fill("#vocabulary input[type=number]", "999")  # there are 16
    page.keyboard.press("Tab")
    assert page.input_value("#vocabulary input[type=number]") == "15"


def test_a_page_that_refreshes_keeps_what_was_chosen(browser, tmp_path):
    path = tmp_path / "report.html"

    def made(steps: int, live: float) -> None:
        write_run(tmp_path / "run", header("micro", 0, steps=100), until=steps, end="" if live else "finished")
        write_html(summarize(load_runs([tmp_path / "run"])[0]), path, live=live)
        (tmp_path / "run" / "record.jsonl").unlink()

    made(50, live=2)
    with opened(browser, path) as page:
        page.focus("input[data-menu=loads]")
        for _ in range(3):
            page.keyboard.press("ArrowLeft")
        chosen = page.inner_text(".slider:has([data-menu=loads]) output")
        page.select_option("select[data-menu=training]", "Gradient norm")
        page.click("table[data-table=runs] thead th:nth-child(4) button")
        page.evaluate("scrollTo(0, 700)")
        page.click("#live button")
        assert page.inner_text("#live button") == "Go on refreshing"
        page.evaluate("window.before = true")
        page.wait_for_timeout(2500)
        assert page.evaluate("window.before") is True  # paused
        page.evaluate("document.querySelector('#live button').click(); scrollTo(0, 700)")
        made(75, live=2)
        until(page, "window.before === undefined && document.documentElement.dataset.drawn", "yes")
        assert page.inner_text(".slider:has([data-menu=loads]) output") == chosen
        assert page.locator("input[data-menu=loads]").get_attribute("max") == "14"
        assert page.input_value("select[data-menu=training]") == "Gradient norm"
        assert page.get_attribute("table[data-table=runs] thead th:nth-child(4)", "aria-sort") == "descending"
        assert abs(page.evaluate("scrollY") - 700) < 60
        made(100, live=0)  # the last page stays
        until(page, "document.getElementById('live') === null && document.documentElement.dataset.drawn", "yes")
        page.evaluate("window.before = true")
        page.wait_for_timeout(2200)
        assert page.evaluate("window.before") is True
