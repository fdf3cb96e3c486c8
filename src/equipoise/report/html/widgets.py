"""What sections are made of, as data for the templates; with the figures, maps and menus that the scripts draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..data.formatting import clean
from .figures import Figure
from .heatmaps import Map

__all__ = ["Cell", "Part", "Row", "Section", "Widgets", "table"]

Part = tuple[str, dict[str, Any]]  # a macro of parts.html.jinja, and its arguments


@dataclass(frozen=True)
class Section:
    """A landmark with a heading, to which the list of sections at the top links."""

    title: str
    lead: str = ""
    parts: Sequence[Part] = ()


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        value: the key for sorting and the content of copies, where that is not the text.
        small: what stands small beside the text, each with its tone: "good", "bad" or "".
        codes: lines in place of the text. colour: of the dot before the text.
    """

    text: object = ""
    value: object = None
    small: Sequence[tuple[str, str]] = ()
    best: bool = False
    codes: Sequence[str] = ()
    colour: int | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table with a column per strategy; ``group`` is a heading above it."""

    name: str
    cells: Sequence[Cell]
    floor: str = ""
    why: str = ""
    group: str = ""


def table(
    name: str, label: str, heads: Sequence[str], rows: Sequence[Sequence[Cell]], left: Sequence[int] = (0,)
) -> Part:
    """A table that can be sorted and copied; the first cell of a row names it, columns in ``left`` are no numbers."""
    return "table", {"name": name, "label": label, "heads": heads, "rows": rows, "left": left}


class Widgets:
    """Collects controls and figures by name; every figure follows the menu that it names."""

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.maps: dict[str, Map] = {}
        self.menus: dict[str, list[str]] = {}
        self.texts: dict[str, Any] = {}

    def lines(
        self, menu: str, title: str, figure: Figure, chips: Sequence[tuple[str, str]] | None = None
    ) -> Part:  # fmt: skip
        """Curves below a menu of their views; ``chips`` names the strategies that buttons show and hide, and says n."""
        self.figures[f"plot-{menu}"] = figure
        labels = self._menu(menu, [view["label"] for view in figure["views"]])
        return "lines", {"menu": menu, "title": title, "labels": labels, "high": figure["height"], "chips": chips}

    def panels(
        self, menu: str, title: str, labels: Sequence[str], figures: Sequence[tuple[str, str, int, Map | None]],
        *, slides: bool = True,
    ) -> Part:  # fmt: skip
        """Maps side by side below what chooses one of ``labels``, each with a name, a note and a colour."""
        shown = []
        for index, (name, note, colour, figure) in enumerate(figures):
            high = 0.0
            if figure is not None:
                self.maps[f"map-{menu}-{index}"] = figure
                rows = max(len(view["z"]) for view in figure["views"])
                high = rows * max(5.0, min(22.0, 520 / rows)) + 36  # what the script will need: nothing jumps
            shown.append({"name": name, "note": note, "colour": colour, "high": f"{high:.0f}" if high else ""})
        return "panels", {
            "menu": menu, "title": title, "labels": self._menu(menu, labels), "slides": slides, "panels": shown
        }  # fmt: skip

    def _menu(self, menu: str, labels: Sequence[str]) -> list[str]:
        self.menus[menu] = [clean(label) for label in labels]
        return self.menus[menu]
