"""Pictures of a page, and what is said where nothing can draw them."""

from __future__ import annotations

import sys

import pytest

from equipoise.errors import ConfigError, OutputError
from equipoise.report.export.png import write_png
from unit.report._browser import needs_chromium

PAGE = """<html data-drawn="yes"><body style="margin: 0"><main><section aria-labelledby="one two/../x"
style="height: 40px">1</section><section style="height: 60px">2</section></main></body></html>"""


def size(path):
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int.from_bytes(head[16:20]), int.from_bytes(head[20:24])


@needs_chromium
def test_a_picture_of_each_section_or_of_the_page(tmp_path):
    pytest.importorskip("playwright", reason="needs playwright")
    made = write_png(PAGE, tmp_path / "all", wide=300)
    assert [path.name for path in made] == ["01-onetwox.png", "02-section.png"]
    assert [size(path) for path in made] == [(600, 80), (600, 120)]
    assert [size(path) for path in write_png(PAGE, tmp_path / "page.png", wide=300)] == [(600, 1800)]
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to write"):
        write_png(PAGE, tmp_path / "file" / "folder")


def test_without_playwright_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "playwright.sync_api", None)
    with pytest.raises(ConfigError, match="pip install playwright"):
        write_png(PAGE, tmp_path)
