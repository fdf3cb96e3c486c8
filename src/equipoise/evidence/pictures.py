"""Small pictures for the HTML page on claims: an interval, curves over steps, domains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..report.data.curves import Curve
from ..report.data.formatting import clip, signed
from ..report.data.statistics import Difference
from ..report.html.pictures import WIDE, Picture, Text, dots, round_numbers, round_up, scale, through
from ..report.html.rendering import slug
from .verdict import Judged

__all__ = ["curves_picture", "domains_picture", "extent", "interval_picture"]


def interval_picture(judged: Judged, reach: float) -> Picture | None:
    """A line for the interval, a large dot for the mean, small ones for seeds, a band for the margin of an "equal".

    Args:
        reach: what the two ends of the axis stand for; zero is in the middle.
    """
    difference, around = judged.difference, judged.contrast.around
    if difference is None:
        return None
    x = scale(-reach, reach, 16, 324)
    margin = None
    if judged.margin is not None:
        left, right = x(around - judged.margin), x(around + judged.margin)
        margin = (left, right - left)
    paths = [("axis", "M16 54H324M16 48v12M324 48v12"), ("zero", f"M{x(0)} 4V60"),
             ("seeds", dots((x(value), 40) for value in difference.by_seed.values()))]  # fmt: skip
    if difference.low is not None and difference.high is not None:
        paths.append(("interval", f"M{x(difference.low)} 18H{x(difference.high)}"))
    paths.append(("mean", dots([(x(difference.mean), 18)])))
    texts = [("start", 16, 82, f"{-reach:g}"), ("", x(0), 82, "0"), ("end", 324, 82, f"{reach:+g}")]
    return Picture(f"pic {slug(judged.verdict or 'shown')}", 340, 88, paths, texts, margin)


def curves_picture(curves: Sequence[tuple[str, Curve | None]], label: str, *, zero: bool = False) -> Picture | None:
    """Lines over training steps, each on its band; None where there is nothing to draw.

    Args:
        curves: (CSS class, curve). label: said in place of the picture. zero: the vertical axis holds zero, and its
            line is drawn.
    """
    known = [(name, curve) for name, curve in curves if curve is not None]
    if not known:
        return None
    values = [value for _, curve in known for part in (curve.mean, curve.low, curve.high) for value in part or []]
    values += [0.0] if zero else []
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    last, right = max(1, *(curve.steps[-1] for _, curve in known)), WIDE - 16
    x, y = scale(0, last, 88, right), scale(low - room, high + room, 236, 16)
    ticks = round_numbers(low - room, high + room)
    paths = [("grid", "".join(f"M88 {y(tick)}H{right}" for tick in ticks))]
    paths += [("zero", f"M88 {y(0)}H{right}")] if zero else []
    texts = [("end", 76, y(tick) + 8, f"{tick:+g}" if zero and tick else f"{tick:g}") for tick in ticks]
    texts += [("start", 88, 272, "0"), ("end", right, 272, f"{last} steps")]
    for name, curve in known:
        line, *edges = (
            [(x(step), y(value)) for step, value in zip(curve.steps, part, strict=True)]
            for part in (curve.mean, curve.high, curve.low)
            if part is not None
        )
        if edges:
            paths.append((f"band {name}", f"{through(edges[0] + edges[1][::-1])}z"))
        paths.append((f"line {name}", through(line)))
        if len(line) == 1:  # a line through one point would not be seen
            paths.append((f"dots {name}", dots(line)))
    return Picture("chart", WIDE, 280, paths, texts, label=label)


def domains_picture(domains: Mapping[str, Difference]) -> Picture | None:
    """A row for each domain: its mean difference with its interval, and the number; None without domains."""
    if not domains:
        return None
    reach = round_up(max(extent(difference) for difference in domains.values()))
    x, bottom = scale(-reach, reach, 208, 412), 36 * len(domains) + 8
    texts: list[Text] = []
    lines, means = "", []
    for place, (name, one) in enumerate(domains.items()):
        y = 36 * place + 24
        texts += [("start", 0, y + 8, clip(name, 16)), ("end", WIDE - 4, y + 8, signed(one.mean, 3))]
        if one.low is not None and one.high is not None:
            lines += f"M{x(one.low)} {y}H{x(one.high)}"
        means.append((x(one.mean), y))
    texts += [("", 208, bottom + 28, f"{-reach:g}"), ("", x(0), bottom + 28, "0"),
              ("", 412, bottom + 28, f"{reach:+g}")]  # fmt: skip
    paths = [("zero", f"M{x(0)} 4V{bottom}"), ("axis", f"M208 {bottom}H412"), ("interval", lines),
             ("mean", dots(means))]  # fmt: skip
    return Picture("chart", WIDE, bottom + 36, [path for path in paths if path[1]], texts)


def extent(difference: Difference | None, around: float = 0.0, margin: float | None = None) -> float:
    """How far from zero a difference, its seeds, its interval and its margin reach."""
    ends = [around - margin, around + margin] if margin is not None else []
    if difference is not None:
        ends += [difference.mean, *difference.by_seed.values()]
        ends += [end for end in (difference.low, difference.high) if end is not None]
    return max(map(abs, ends), default=0.0)
