"""Opens pages of a report in headless Chromium and keeps what they complained of or asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from equipoise.report.export.browser import BROWSERS

CHROMIUM = next((found for name in BROWSERS if (found := shutil.which(name))), None)
WITHOUT = "no Chromium on this machine (apt install chromium): what a page looks like is tested where one is"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)


@contextmanager
def launched() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any,
    path: Path,
    *,
    wide: int = 1200,
    scheme: str = "light",
    ready: str = "html[data-drawn=yes]",
    **options: Any,
) -> Iterator[Any]:
    """A drawn page; in the end it must not have asked for anything, nor have said anything on the console."""
    context = browser.new_context(viewport={"width": wide, "height": 900}, color_scheme=scheme, **options)
    page = context.new_page()
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: complaints.append(dialog.message))
    page.on("request", lambda request: complaints.append(request.url) if request.url != path.as_uri() else None)
    page.goto(path.as_uri())
    page.wait_for_selector(ready)
    yield page
    assert complaints == []
    context.close()


def until(page: Any, expression: str, wanted: Any) -> None:
    """Waits until a script's value is this; wait_for_function would evaluate text, which the page forbids itself."""
    from playwright.sync_api import Error

    for _ in range(200):
        with suppress(Error):  # a page that loads itself again just now
            if page.evaluate(expression) == wanted:
                return
        page.wait_for_timeout(50)
    assert page.evaluate(expression) == wanted
