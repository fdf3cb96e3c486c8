"""Takes the figures out of a page as SVG files that stand alone, as its buttons do."""

from __future__ import annotations

import re
from pathlib import Path

from ...errors import ConfigError
from .browser import in_browser, save

__all__ = ["write_svg"]


def write_svg(page: str, folder: str | Path, *, scheme: str = "light") -> list[Path]:
    """Writes each figure as the page first shows it, numbered in its order; other views have a button on the page.

    Args:
        page: the HTML of ``render_html``. scheme: "light" or "dark".

    Returns the paths written. Raises ConfigError if Playwright or a browser is missing, or if ``folder`` is a file;
    OutputError if a figure cannot be written.
    """
    folder = Path(folder)
    if folder.is_file() or folder.suffix.lower() == ".svg":
        raise ConfigError(expected="a folder for --svg: a page has many figures", got=str(folder),
                          do="name a folder, or open the page and save one figure with its button")  # fmt: skip
    figures = in_browser(page, lambda opened: opened.evaluate("document.documentElement.figuresAsSvg()"), scheme=scheme)
    return [
        save(folder / f"{number:02d}-{re.sub(r'[^a-z0-9.-]', '', name)}", text.encode("utf-8", "replace"))
        for number, (name, text) in enumerate(figures, start=1)
    ]
