"""Tables and paragraphs of at most 80 columns as plain text, for reports, plans and inspections."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from ..data.formatting import clip, width

__all__ = ["COLUMNS", "align", "rule", "table", "wrap"]

COLUMNS = 80


def wrap(text: str, indent: str = "") -> str:
    """Wraps ``text`` at 80 columns; lines after the first begin with ``indent``. Longer words are broken.

    >>> wrap("one two " * 12, "  ").splitlines()[1]
    '  one two one two'
    """
    lines = textwrap.wrap(text, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)
    return "\n".join(clip(line, COLUMNS) for line in lines)  # textwrap counts a wide character as one column


def rule(columns: int) -> str:
    """A horizontal line, at most 80 columns long."""
    return "─" * min(COLUMNS, columns)


def align(rows: Sequence[Sequence[str]], *, gaps: Sequence[int] = (3, 2), least: Sequence[int] = ()) -> list[str]:
    """One line per row: the first column aligned left, the others right.

    Args:
        gaps: spaces between two columns; the first with which a line fits into 80 columns, else the last.
        least: the smallest width of each column; columns are wider where their cells are.

    >>> align([["layer", "dead"], ["0", "12"]], gaps=(2,))
    ['layer  dead', '0        12']
    """
    widths = _widths(rows, least)
    gap = " " * _gap(widths, gaps)
    return [
        gap.join(
            (cell + _pad(cell, wide)) if not i else (_pad(cell, wide) + cell)
            for i, (cell, wide) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    note: str = "",
    *,
    gaps: Sequence[int] = (3, 2),
    spans: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """A title, a rule, the header and the rows, and a note in a wrapped paragraph below them.

    Args:
        gaps: see `align`.
        spans: headings above several columns: heading -> the names of its columns in ``header``.

    >>> print(table("Loads", ["expert", "load"], [["0", "12"], ["1", "7"]], gaps=(2,)))
    Loads
    ────────────
    expert  load
    0         12
    1          7
    """
    cells = [header, *rows]
    widths = _widths(cells)
    gap = _gap(widths, gaps)
    lines = [title, rule(sum(widths) + gap * (len(widths) - 1))]
    lines += [_span_line(header, widths, gap, spans)] if spans else []
    lines += align(cells, gaps=gaps)
    return "\n".join([*lines, *([wrap(note)] if note else [])])


def _span_line(header: Sequence[str], widths: Sequence[int], gap: int, spans: Mapping[str, Sequence[str]]) -> str:
    ends = [sum(widths[: i + 1]) + gap * i for i in range(len(widths))]
    line = ""
    for heading, names in spans.items():
        inside = [i for i, name in enumerate(header) if name in names]
        if inside:
            start = ends[inside[0]] - widths[inside[0]]
            line = line.ljust(start) + f" {heading} ".center(ends[inside[-1]] - start, "·")
    return line


def _widths(rows: Sequence[Sequence[str]], least: Sequence[int] = ()) -> list[int]:
    widest = [max(map(width, column)) for column in zip(*rows, strict=True)]
    return [max(pair) for pair in zip(widest, least, strict=True)] if least else widest


def _gap(widths: Sequence[int], gaps: Sequence[int]) -> int:
    return next((gap for gap in gaps if sum(widths) + gap * (len(widths) - 1) <= COLUMNS), gaps[-1])


def _pad(cell: str, wide: int) -> str:
    return " " * (wide - width(cell))
