"""Small pictures for the HTML page, as SVG whose colours are the page's: an interval, curves over steps, domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..report.data.curves import Curve
from ..report.data.formatting import clip, signed
from ..report.data.statistics import Difference
from ..report.html.widgets import minus, safe
from .verdict import Judged

__all__ = ["curves_picture", "domains_picture", "extent", "interval_picture", "round_up", "slug_of"]

WIDE = 520  # of a chart, in units of its own: half pixels, so that whole numbers are exact enough


def interval_picture(judged: Judged, reach: float) -> str:
    """A line for the interval, a large dot for the mean, small ones for seeds, a band for the margin of an "equal".

    Args:
        reach: what the two ends of the axis stand for; zero is in the middle.
    """
    difference, around = judged.difference, judged.contrast.around
    if difference is None:
        return ""
    x = _scale(-reach, reach, 16, 324)
    parts = []
    if judged.margin is not None:
        left, right = x(around - judged.margin), x(around + judged.margin)
        parts.append(f'<rect class="margin" x="{left}" y="4" width="{right - left}" height="44"/>')
    parts += [_path("axis", "M16 54H324M16 48v12M324 48v12"), _path("zero", f"M{x(0)} 4V60")]
    parts.append(_path("seeds", _dots((x(value), 40) for value in difference.by_seed.values())))
    if difference.low is not None and difference.high is not None:
        parts.append(_path("interval", f"M{x(difference.low)} 18H{x(difference.high)}"))
    parts.append(_path("mean", _dots([(x(difference.mean), 18)])))
    parts += [_text(16, 82, f"{-reach:g}", "start"), _text(x(0), 82, "0"), _text(324, 82, f"{reach:+g}", "end")]
    return _svg(f"pic {slug_of(judged.verdict)}", 340, 88, parts)


def curves_picture(curves: Sequence[tuple[str, Curve | None]], label: str, *, zero: bool = False) -> str:
    """Lines over training steps, each on its band; "" where there is nothing to draw.

    Args:
        curves: (CSS class, curve). label: said in place of the picture. zero: the vertical axis holds zero, and its
            line is drawn.
    """
    known = [(name, curve) for name, curve in curves if curve is not None]
    if not known:
        return ""
    values = [value for _, curve in known for part in (curve.mean, curve.low, curve.high) for value in part or []]
    values += [0.0] if zero else []
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    last, right = max(1, *(curve.steps[-1] for _, curve in known)), WIDE - 16
    x, y = _scale(0, last, 88, right), _scale(low - room, high + room, 236, 16)
    ticks = _ticks(low - room, high + room)
    parts = [_path("grid", "".join(f"M88 {y(tick)}H{right}" for tick in ticks))]
    parts += [_path("zero", f"M88 {y(0)}H{right}")] if zero else []
    parts += [_text(76, y(tick) + 8, f"{tick:+g}" if zero and tick else f"{tick:g}", "end") for tick in ticks]
    parts += [_text(88, 272, "0", "start"), _text(right, 272, f"{last} steps", "end")]
    for name, curve in known:
        line, *edges = (
            [(x(step), y(value)) for step, value in zip(curve.steps, part, strict=True)]
            for part in (curve.mean, curve.high, curve.low)
            if part is not None
        )
        if edges:
            parts.append(_path(f"band {name}", f"{_through(edges[0] + edges[1][::-1])}z"))
        parts.append(_path(f"line {name}", _through(line)))
        if len(line) == 1:  # a line through one point would not be seen
            parts.append(_path(f"dots {name}", _dots(line)))
    return _svg("chart", WIDE, 280, parts, label)


def domains_picture(domains: Mapping[str, Difference]) -> str:
    """A row for each domain: its mean difference with its interval, and the number; "" without domains."""
    if not domains:
        return ""
    reach = round_up(max(extent(difference) for difference in domains.values()))
    x, bottom = _scale(-reach, reach, 208, 412), 36 * len(domains) + 8
    parts = [_path("zero", f"M{x(0)} 4V{bottom}"), _path("axis", f"M208 {bottom}H412")]
    lines, means = "", []
    for place, (name, one) in enumerate(domains.items()):
        y = 36 * place + 24
        parts += [_text(0, y + 8, clip(name, 16), "start"), _text(WIDE - 4, y + 8, signed(one.mean, 3), "end")]
        if one.low is not None and one.high is not None:
            lines += f"M{x(one.low)} {y}H{x(one.high)}"
        means.append((x(one.mean), y))
    parts += [_path("interval", lines)] if lines else []
    parts.append(_path("mean", _dots(means)))
    parts += [_text(208, bottom + 28, f"{-reach:g}"), _text(x(0), bottom + 28, "0"),
              _text(412, bottom + 28, f"{reach:+g}")]  # fmt: skip
    return _svg("chart", WIDE, bottom + 36, parts)


def extent(difference: Difference | None, around: float = 0.0, margin: float | None = None) -> float:
    """How far from zero a difference, its seeds, its interval and its margin reach."""
    ends = [around - margin, around + margin] if margin is not None else []
    if difference is not None:
        ends += [difference.mean, *difference.by_seed.values()]
        ends += [end for end in (difference.low, difference.high) if end is not None]
    return max(map(abs, ends), default=0.0)


def round_up(value: float, steps: Sequence[float] = (1, 1.5, 2, 3, 4, 5, 6, 8, 10)) -> float:
    """The next of these numbers times a power of ten; 0.01 for what is zero but for rounding.

    >>> [round_up(value) for value in (0.0136, 0.02, 0.23, 6.0, 0.0)]
    [0.015, 0.02, 0.3, 6.0, 0.01]
    """
    if value < 1e-12:
        return 0.01
    power = math.floor(math.log10(value))
    return next(found for step in steps if (found := round(step * 10.0**power, 12 - power)) >= value)


def slug_of(verdict: str) -> str:
    """A verdict as a CSS class."""
    return verdict.replace(" ", "-") or "shown"


def _ticks(low: float, high: float) -> list[float]:
    """Two to five round numbers between the ends.

    >>> _ticks(3.5, 4.9), _ticks(-0.021, 0.003)
    ([3.5, 4.0, 4.5], [-0.02, -0.01, 0.0])
    """
    step = round_up((high - low) / 4, (1, 2, 5, 10))
    return [round(n * step, 10) + 0.0 for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _scale(low: float, high: float, start: int, end: int) -> Callable[[float], int]:
    return lambda value: round(start + (value - low) / (high - low) * (end - start))


def _through(points: Iterable[tuple[int, int]]) -> str:
    return "M" + " ".join(f"{x} {y}" for x, y in points)


def _dots(points: Iterable[tuple[int, int]]) -> str:
    """Lines of no length: their round ends are dots as wide as the stroke."""
    return "".join(f"M{x} {y}h0" for x, y in points)


def _path(kind: str, data: str) -> str:
    return f'<path class="{kind}" d="{data}"/>'


def _text(x: int, y: int, text: str, anchor: str = "middle") -> str:
    side = "" if anchor == "middle" else f' class="{anchor}"'
    return f'<text{side} x="{x}" y="{y}">{minus(safe(text))}</text>'


def _svg(kind: str, wide: int, high: int, parts: Iterable[str], label: str = "") -> str:
    """Read out as its label, or as the texts in it."""
    said = f' role="img" aria-label="{minus(safe(label))}"' if label else ""
    return f'<svg class="{kind}" viewBox="0 0 {wide} {high}"{said}>{"".join(parts)}</svg>'
