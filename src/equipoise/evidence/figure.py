"""docs/evidence.svg: the differences in held-out loss of all claims, their intervals, and every seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from .verdict import ClaimVerdict, Judged

__all__ = ["render_figure"]

WIDTH, LEFT, RIGHT, ROW, TOP = 860, 330, 110, 22, 40
STYLE = 'font-family="system-ui, sans-serif" font-size="12" fill="#111827" role="img"'
COLORS = {"confirmed": "#1a7f37", "refuted": "#b42318", "undecided": "#6b7280", "unfinished": "#9a6700", "": "#475569"}


def render_figure(judged: Sequence[ClaimVerdict]) -> str:
    """An SVG; nothing but its frame where no difference has an interval yet.

    A line is the 95 % interval, a large dot the mean, small dots the seeds, and a band the margin of an "equal".
    """
    rows = [
        (claim.claim.name, one)
        for claim in judged
        for one in claim.judged
        if one.contrast.measure == "loss" and one.difference is not None and one.difference.low is not None
    ]
    ends = [abs(end) for _, one in rows for end in _ends(one)]
    reach = max(ends, default=0.01) * 1.05
    middle, scale = (LEFT + WIDTH - RIGHT) / 2, (WIDTH - RIGHT - LEFT) / 2 / reach

    def x(value: float) -> float:
        return round(middle + value * scale, 1)

    height = TOP + ROW * max(len(rows), 1) + 34
    bottom = height - 28
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {STYLE}>',
        "<title>Differences in held-out loss with 95 % intervals, claim by claim</title>",
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{middle}" y="18" text-anchor="middle">held-out loss, treated - baseline (nats per token)</text>',
    ]
    for tick in _ticks(reach):
        color = "#111827" if tick == 0 else "#d1d5db"
        parts.append(f'<path d="M{x(tick)} {TOP - 8}V{bottom}" stroke="{color}" fill="none"/>')
        label = f"{tick:+.3f}" if tick else "0"
        parts.append(f'<text x="{x(tick)}" y="{bottom + 16}" text-anchor="middle" fill="#4b5563">{label}</text>')
    for place, (name, one) in enumerate(rows):
        parts += _row(name, one, TOP + ROW * place + ROW / 2, x)
    return "\n".join([*parts, "</svg>", ""])


def _row(name: str, one: Judged, y: float, x: Callable[[float], float]) -> list[str]:
    contrast, difference = one.contrast, one.difference
    assert difference is not None and difference.low is not None and difference.high is not None
    color = COLORS[one.verdict]
    label = f"{name}  {contrast.treated} - {contrast.baseline}, {contrast.cell}"
    shown = label if len(label) <= 52 else f"{label[:51]}…"
    parts = [f"<g><title>{escape(label)}</title>", f'<text x="8" y="{y + 4}">{escape(shown)}</text>']
    if one.margin is not None:
        left, right = x(contrast.around - one.margin), x(contrast.around + one.margin)
        parts.append(f'<rect x="{left}" y="{y - 8}" width="{right - left:.1f}" height="16" fill="#dbeafe"/>')
    parts += [
        f'<circle cx="{x(value)}" cy="{y}" r="2" fill="{color}" opacity="0.45"/>'
        for value in difference.by_seed.values()
    ]
    parts += [
        f'<path d="M{x(difference.low)} {y}H{x(difference.high)}" stroke="{color}" stroke-width="2" fill="none"/>',
        f'<circle cx="{x(difference.mean)}" cy="{y}" r="4.5" fill="{color}"/>',
        f'<text x="{WIDTH - RIGHT + 12}" y="{y + 4}" fill="{color}">{one.verdict or f"n = {difference.n}"}</text></g>',
    ]
    return parts


def _ends(one: Judged) -> list[float]:
    assert one.difference is not None and one.difference.low is not None and one.difference.high is not None
    return [one.difference.low, one.difference.high, *one.difference.by_seed.values(), one.margin or 0.0]


def _ticks(reach: float) -> list[float]:
    """Round numbers from -reach to reach, zero among them.

    >>> _ticks(0.021)
    [-0.02, -0.01, 0.0, 0.01, 0.02]
    """
    step = next(step for power in range(-5, 3) for step in (10.0**power, 2 * 10.0**power, 5 * 10.0**power)
                if reach / step <= 4)  # fmt: skip
    most = int(reach / step)
    return [round(n * step, 10) for n in range(-most, most + 1)]
