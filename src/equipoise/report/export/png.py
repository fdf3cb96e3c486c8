"""Draws the sections of a page as PNG files in a headless browser."""

from __future__ import annotations

import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ...errors import ConfigError, OutputError
from ..html.page import write_file

__all__ = ["BROWSERS", "write_png"]

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
WAIT = 60_000  # milliseconds for a page to be drawn


def write_png(page: str, path: str | Path, *, wide: int = 1200, scheme: str = "light") -> list[Path]:
    """Draws the whole page if ``path`` ends in .png, else a folder with a numbered picture of each section.

    Args:
        page: the HTML of ``render_html``. wide: width of the window in CSS pixels; pictures have twice as many.
        scheme: "light" or "dark".

    Returns the paths written. Raises ConfigError if Playwright or a browser is missing, OutputError if a picture cannot
    be written.
    """
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        raise _missing("Playwright, which steers the browser that draws the pictures") from None
    with ThreadPoolExecutor(
        1
    ) as thread:  # Playwright refuses to run in a thread with an event loop, such as that of a notebook
        return thread.submit(_draw, page, Path(path), wide, scheme).result()


def _draw(page: str, path: Path, wide: int, scheme: str) -> list[Path]:
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
            opened.add_style_tag(content=".copies, .skip, nav, .live { display: none !important }")
            if path.suffix.lower() == ".png":
                return [_save(path, opened.screenshot(full_page=True))]
            made = []
            for number, part in enumerate(opened.query_selector_all("main section"), start=1):
                name = re.sub(r"[^a-z0-9-]", "", part.get_attribute("aria-labelledby") or "section")
                made.append(_save(path / f"{number:02d}-{name}.png", _picture(part)))
            return made
        except Error as error:
            raise OutputError(expected=f"pictures in {path}", got=str(error).partition("\n")[0],
                              do="ask for the page with --out instead") from None  # fmt: skip
        finally:
            browser.close()


def _picture(part: Any) -> bytes:
    part.scroll_into_view_if_needed()
    return part.screenshot()


def _save(path: Path, picture: bytes) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture)
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
