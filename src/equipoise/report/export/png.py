"""Draws the sections of a page as PNG files in a headless browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .browser import in_browser, save

__all__ = ["write_png"]


def write_png(page: str, path: str | Path, *, wide: int = 1200, scheme: str = "light") -> list[Path]:
    """Draws the whole page if ``path`` ends in .png, else a folder with a numbered picture of each section.

    Args:
        page, wide, scheme: see `in_browser`.

    Returns the paths written. Raises ConfigError if Playwright or a browser is missing, OutputError if a picture cannot
    be written.
    """
    path = Path(path)

    def take(opened: Any) -> list[Path]:
        opened.add_style_tag(content=".copies, .skip, nav, .live { display: none !important }")
        if path.suffix.lower() == ".png":
            return [save(path, opened.screenshot(full_page=True))]
        made = []
        for number, part in enumerate(opened.query_selector_all("main section"), start=1):
            name = re.sub(r"[^a-z0-9-]", "", part.get_attribute("aria-labelledby") or "section")
            made.append(save(path / f"{number:02d}-{name}.png", _picture(part)))
        return made

    return in_browser(page, take, wide=wide, scheme=scheme)


def _picture(part: Any) -> bytes:
    part.scroll_into_view_if_needed()
    return part.screenshot()
