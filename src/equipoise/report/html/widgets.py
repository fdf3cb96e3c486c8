"""Building blocks of the page: controls, charts, maps and tables, and the data that the scripts draw."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from typing import Any

from ..data.formatting import clean
from .figures import Figure
from .heatmaps import Map

__all__ = ["Widgets", "breakable", "cell", "dot", "minus", "safe", "section", "table"]

HELP = "Arrow keys tell its cells."


def safe(text: object) -> str:
    """Escapes text for any place in the page."""
    return escape(clean(str(text)))


def minus(text: str) -> str:
    """The sign of numbers as a minus; a hyphen within a name stays one.

    >>> minus("loss-free: -0.8 %")
    'loss-free: −0.8 %'
    """
    return re.sub(r"(?<!\w)-(?=\d)", "−", text)


def dot(index: int) -> str:
    """A style with the colour of a strategy; after eight, the colours other than the baseline's repeat."""
    return f'style="--c:var(--s{index if index < 8 else 1 + (index - 1) % 7})"'


def breakable(name: str) -> str:
    """A name with optional line breaks between its parts: global+ micro, global@ 0.02, Qwen/ Qwen3."""
    return re.sub(r"([+@:/_])", r"\1<wbr>", safe(name))


def section(title: str, lead: str, body: str) -> str:
    """A landmark with a heading, to which the list of sections at the top links."""
    name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
    text = f'<p class="lead">{escape(lead)}</p>' if lead else ""
    return (
        f'<section aria-labelledby="{name}"><h2 id="{name}" tabindex="-1">{escape(title)}</h2>{text}{body}</section>\n'
    )


def cell(shown: str, value: object = None, kind: str = "td", left: bool = False) -> str:
    """A table cell: ``shown`` is HTML, ``value`` the key for sorting and the content of copies."""
    data = "" if value is None else f' data-value="{safe(value)}"'
    scope = ' scope="row"' if kind == "th" else ""
    side = ' class="left"' if left else ""
    return f"<{kind}{scope}{side}{data}>{shown}</{kind}>"


def table(name: str, label: str, heads: Sequence[str], rows: Sequence[str], *, left: Sequence[int] = (0,)) -> str:
    """A table that can be sorted and copied.

    Args:
        heads: texts. rows: HTML of the cells. left: indices of the columns that are not numbers.
    """
    head = "".join(
        f'<th scope="col"{" class=left" if i in left else ""}>{safe(one)}</th>' for i, one in enumerate(heads)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return (
        f'<div class="wide"><table data-table="{name}" data-sorts="yes" aria-label="{safe(label)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Widgets:
    """Collects controls and figures by name; every figure follows the menu that it names."""

    def __init__(self) -> None:
        self.figures: dict[str, Figure] = {}
        self.maps: dict[str, Map] = {}
        self.menus: dict[str, list[str]] = {}
        self.texts: dict[str, Any] = {}

    def select(self, menu: str, labels: Sequence[str], what: str, start: int = 0) -> str:
        """A menu over ``labels``; empty if there is no choice."""
        self.menus[menu] = [clean(label) for label in labels]
        if len(labels) < 2:
            return ""
        options = "".join(
            f"<option{' selected' if index == start else ''}>{safe(label)}</option>"
            for index, label in enumerate(labels)
        )
        return f'<label class="menu">{escape(what)} <select data-menu="{menu}">{options}</select></label>'

    def slider(self, menu: str, labels: Sequence[str], what: str, start: int | None = None) -> str:
        """A slider over ordered labels (steps, layers); empty if there is no choice."""
        self.menus[menu] = [clean(label) for label in labels]
        if len(labels) < 2:
            return ""
        at = len(labels) - 1 if start is None else start
        return (
            f'<label class="slider">{escape(what)} <input type="range" min="0" max="{len(labels) - 1}" step="1" '
            f'data-menu="{menu}" data-start="{at}" value="{at}"> <output>{safe(labels[at])}</output></label>'
        )

    def lines(self, name: str, figure: Figure, label: str, *, chips: bool = False) -> str:
        identity = f"plot-{name}"
        self.figures[identity] = figure
        flag = ' data-lines="yes"' if chips else ""
        return (
            f'<div class="plot" id="{identity}" data-menu="{name}"{flag} role="img" '
            f'aria-label="{safe(label)}" style="--high:{figure["height"]}px"></div>'
        )

    def map(self, name: str, figure: Map, label: str, menu: str) -> str:
        identity = f"map-{name}"
        self.maps[identity] = figure
        rows = max(len(view["z"]) for view in figure["views"])
        high = (
            rows * max(5.0, min(22.0, 520 / rows)) + 36
        )  # the height that the script will need, so that the layout does not jump
        return (
            f'<div class="map" id="{identity}" data-menu="{menu}" tabindex="0" role="application" '
            f'aria-roledescription="heat map" aria-label="{safe(label)}. {HELP}" style="min-height:{high:.0f}px"></div>'
        )

    def panels(self, menu: str, title: str, figures: Sequence[tuple[str, int, Map | None]]) -> str:
        """Maps side by side, each below its name (HTML) and a dot in its colour."""
        made = []
        for index, (name, colour, figure) in enumerate(figures):
            inner = '<p class="empty">Nothing recorded.</p>'
            if figure is not None:
                text = re.sub(r"<[^>]*>", " ", name)
                inner = self.map(f"{menu}-{index}", figure, f"{title}: {text}", menu)
            made.append(f'<div class="panel"><h3><i {dot(colour)}></i>{name}</h3>{inner}</div>')
        return f'<div class="panels">{"".join(made)}</div>'

    @staticmethod
    def ramp(menu: str) -> str:
        """The colour scale of the maps of this menu; the script fills it in."""
        return f'<span class="scale" data-key="{menu}"></span>'
