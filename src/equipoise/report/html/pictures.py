"""What pictures are made of: SVG paths and texts, which picture.html.jinja draws, scales and round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

__all__ = ["WIDE", "Picture", "Text", "dots", "round_numbers", "round_up", "scale", "through"]

WIDE = 520  # of a chart, in units of its own: half pixels, so that whole numbers are exact enough

Text = tuple[str, int, int, str]  # side that stands at x ("start", "end", "" for the middle), x, y, text


@dataclass(frozen=True)
class Picture:
    """What picture.html.jinja draws.

    Args:
        paths: (CSS class, SVG path data), drawn in this order on the band.
        margin: left end and width of a band.
        label: said in place of the texts.
    """

    kind: str
    wide: int
    high: int
    paths: Sequence[tuple[str, str]]
    texts: Sequence[Text]
    margin: tuple[int, int] | None = None
    label: str = ""


def round_up(value: float, steps: Sequence[float] = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)) -> float:
    """The next of these numbers times a power of ten; 0.01 for what is zero but for rounding.

    >>> [round_up(value) for value in (0.0136, 0.02, 0.23, 6.0, 0.0)]
    [0.015, 0.02, 0.3, 6.0, 0.01]
    """
    if value < 1e-12:
        return 0.01
    power = math.floor(math.log10(value))
    return next(found for step in steps if (found := round(step * 10.0**power, 12 - power)) >= value)


def round_numbers(low: float, high: float) -> list[float]:
    """Two to five round numbers between the ends.

    >>> round_numbers(3.5, 4.9), round_numbers(-0.021, 0.003)
    ([3.5, 4.0, 4.5], [-0.02, -0.01, 0.0])
    """
    step = round_up((high - low) / 4, (1, 2, 5, 10))
    return [round(n * step, 10) + 0.0 for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def scale(low: float, high: float, start: int, end: int) -> Callable[[float], int]:
    """Where a value lies between two ends of a picture."""
    return lambda value: round(start + (value - low) / (high - low) * (end - start))


def through(points: Iterable[tuple[int, int]]) -> str:
    """A line through points."""
    return "M" + " ".join(f"{x} {y}" for x, y in points)


def dots(points: Iterable[tuple[int, int]]) -> str:
    """Lines of no length: their round ends are dots as wide as the stroke."""
    return "".join(f"M{x} {y}h0" for x, y in points)
