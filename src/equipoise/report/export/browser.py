"""A page in a headless browser, drawn: what pictures and figures are taken out of."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from ...errors import ConfigError, OutputError
from ..html.page import write_file

__all__ = ["BROWSERS", "in_browser", "save"]

T = TypeVar("T")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60_000  # milliseconds for a page to be drawn


def in_browser(page: str, take: Callable[[Any], T], *, wide: int = 1200, scheme: str = "light") -> T:
    """What ``take`` makes of the drawn page, which it gets as a Playwright page.

    Args:
        page: the HTML of ``render_html``. wide: width of the window in CSS pixels; pictures have twice as many.
        scheme: "light" or "dark".

    Raises ConfigError if Playwright or a browser is missing, OutputError where the page cannot be drawn.
    """
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        raise _missing("Playwright, which steers the browser that draws the pictures") from None
    with ThreadPoolExecutor(
        1
    ) as thread:  # Playwright refuses to run in a thread with an event loop, such as that of a notebook
        return thread.submit(_drawn, page, take, wide, scheme).result()


def _drawn(page: str, take: Callable[[Any], T], wide: int, scheme: str) -> T:
    from playwright.sync_api import Error, sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        source = write_file(Path(folder) / "page.html", page)
        try:
            browser = playwright.chromium.launch(executable_path=_browser(), args=["--disable-gpu"])
        except Error:
            raise _missing("a Chromium that Playwright can start") from None
        try:
            opened = browser.new_page(viewport={"width": wide, "height": 900}, device_scale_factor=2,
                                      color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]  # fmt: skip
            opened.goto(source.as_uri())
            opened.wait_for_selector("html[data-drawn=yes]", timeout=WAIT)
            return take(opened)
        except Error as error:
            raise OutputError(expected="a page that a browser can draw", got=str(error).partition("\n")[0],
                              do="ask for the page with --out instead") from None  # fmt: skip
        finally:
            browser.close()


def save(path: Path, content: bytes) -> Path:
    """Raises OutputError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        raise OutputError(expected=f"to write {path}", got=error.strerror or str(error),
                          do="free disk space or name another folder") from None  # fmt: skip
    return path


def _browser() -> str | None:
    """A browser of the system; None makes Playwright use the one that it installed."""
    return next((found for name in BROWSERS if (found := shutil.which(name))), None)


def _missing(what: str) -> ConfigError:
    return ConfigError(expected=what, got="it is not installed",
                       do="pip install playwright, and a browser: your system's chromium, or "
                          "`python -m playwright install chromium`")  # fmt: skip
