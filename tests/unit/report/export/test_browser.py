"""A page in a browser that nobody sees: what is taken out of it, and what is said where there is none."""

from __future__ import annotations

import sys

import pytest

from equipoise.errors import ConfigError, OutputError
from equipoise.report.export import browser
from equipoise.report.export.browser import in_browser, save
from unit.report._browser import needs_chromium

PAGE = "<html data-drawn='yes'><body><p>here</p></body></html>"


@needs_chromium
def test_what_is_taken_is_given_back(monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    size = "[innerWidth, devicePixelRatio, matchMedia('(prefers-color-scheme: dark)').matches]"
    found = in_browser(PAGE, lambda page: (page.inner_text("p"), page.evaluate(size)), wide=700, scheme="dark")
    assert found == ("here", [700, 2, True])

    def broken(page):
        raise playwright.Error("it broke\nlong ago")

    with pytest.raises(OutputError, match="it broke"):
        in_browser(PAGE, broken)
    monkeypatch.setattr(browser, "WAIT", 10)
    with pytest.raises(OutputError, match="a page that a browser can draw"):
        in_browser("<p>never drawn</p>", lambda page: page)


def test_without_playwright_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(ConfigError, match="pip install playwright"):
        in_browser(PAGE, lambda page: page)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path):
    assert save(tmp_path / "new" / "a", b"x").read_bytes() == b"x"
    with pytest.raises(OutputError, match="to write"):
        save(tmp_path / "new" / "a" / "b", b"x")
