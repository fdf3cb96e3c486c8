"""Formats numbers and names, for the terminal and the page alike."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence

__all__ = ["bytes_text", "clean", "clip", "count", "duration", "fine_perplexity", "listed", "number", "percent",
           "rough_perplexity", "signed", "width"]  # fmt: skip


def clean(text: str) -> str:
    """Replaces control, format and surrogate characters, e.g. in a name from a file, by their escapes.

    >>> clean("a\\x1b[31mb\\u202ec")
    'a\\\\x1b[31mb\\\\u202ec'
    """
    if text.isprintable():  # nearly always, and a thousand times as fast
        return text
    bad = ("Cc", "Cf", "Cs", "Zl", "Zp")
    return "".join(ascii(char)[1:-1] if unicodedata.category(char) in bad else char for char in text)


def width(text: str) -> int:
    """Columns that a terminal needs: wide characters take two, combining ones none.

    >>> width("abc"), width("中文")
    (3, 4)
    """
    wide = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text)
    return wide - sum(bool(unicodedata.combining(char)) for char in text)


def clip(text: str, columns: int, *, keep_end: bool = True) -> str:
    """Shortens to ``columns`` with an ellipsis in place of the middle, since names differ at both ends.

    ``keep_end=False`` cuts the end instead.

    >>> clip("sequences:8@0.02+micro", 12), clip("sequences:8@0.02+micro", 12, keep_end=False)
    ('sequen…micro', 'sequences:8…')
    """
    if width(text) <= columns:
        return text
    head, tail = "", ""
    if not keep_end:
        while width(head + text[len(head)]) < columns:
            head += text[len(head)]
        return f"{head}…"
    while width(head) + width(tail) < columns - 1:
        if width(head) <= width(tail):
            head += text[len(head)]
        else:
            tail = text[-len(tail) - 1] + tail
    while width(head) + width(tail) > columns - 1:  # the last character was a wide one
        head, tail = (head, tail[1:]) if tail else (head[:-1], "")
    return f"{head}…{tail}"


def number(value: float | None, places: int | None = None) -> str:
    """About three significant digits, or ``places`` decimals; a dash for None and NaN.

    >>> [number(x) for x in (38.349, 0.0983, 12345.6, 0.00012, 0.0, None)]
    ['38.3', '0.098', '12,346', '0.0001', '0', '–']
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    size = abs(value)
    if places is None:
        if size < 0.00005:
            return "0"
        places = 4 if size < 0.001 else 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:,.{places}f}"


def count(value: float | None) -> str:
    """A mean of counts, without decimals if it is whole.

    >>> count(2.0), count(2.5), count(None)
    ('2', '2.5', '–')
    """
    return number(value, 0 if value is not None and value == round(value) else 1)


def plural(n: int, noun: str) -> str:
    """
    >>> plural(1, "layer"), plural(1200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def listed(names: Sequence[str]) -> str:
    """Joins names in a sentence.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def signed(value: float | None, places: int | None = None) -> str:
    """A difference with its sign.

    >>> signed(0.5), signed(-0.5), signed(0)
    ('+0.500', '-0.500', '0')
    """
    text = number(value, places)
    return f"+{text}" if value is not None and value > 0 and text not in ("0", "–") else text


def percent(value: float | None) -> str:
    """A relative difference.

    >>> percent(-0.0836), percent(0.5), percent(-0.0001), percent(None)
    ('-8.4%', '+50.0%', '0.0%', '–')
    """
    if value is None or not math.isfinite(value):
        return "–"
    return "0.0%" if abs(value) < 0.0005 else f"{100 * value:+.1f}%"


def rough_perplexity(value: float | None) -> str:
    """One decimal below 1000.

    >>> rough_perplexity(38.349), rough_perplexity(2089.5)
    ('38.3', '2,090')
    """
    return number(value, 0 if value is not None and value >= 1000 else 1)


def fine_perplexity(value: float | None) -> str:
    """Four significant digits.

    >>> fine_perplexity(8.0381), fine_perplexity(38.349), fine_perplexity(2089.5)
    ('8.038', '38.35', '2,090')
    """
    size = value if value is not None and math.isfinite(value) else 0.0
    return number(value, 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 10 else 3)


def duration(seconds: float) -> str:
    """Seconds as the two largest units.

    >>> duration(42), duration(754), duration(7260)
    ('42 s', '12 min 34 s', '2 h 1 min')
    """
    if not math.isfinite(seconds):
        return "–"
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"


def bytes_text(count: float | None) -> str:
    """A size in MiB or GiB.

    >>> bytes_text(1.5 * 2**30), bytes_text(3 * 2**20)
    ('1.50 GiB', '3 MiB')
    """
    if count is None or not math.isfinite(count) or count <= 0:
        return "–"
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"
