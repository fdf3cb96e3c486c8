"""The grid of points, a sample of it that covers every pair of values, and the file that a killed run goes on from."""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from _contestants import Point

__all__ = ["AXES", "every", "run", "sample", "worst"]

AXES: dict[str, tuple] = {
    "tokens": (256, 1024, 4096, 16384),
    "experts": (8, 16, 32, 64, 128, 256),
    "top_k": (1, 2, 4, 8),
    "width": ((128, 128), (256, 128), (512, 256)),
    "skew": (0, 2),
    "dtype": ("bf16", "fp32"),
    "threads": (1, 2),
}
CORNERS = ("tokens", "experts", "top_k")
MOST_WORK = 1 << 33  # T * K * D * H; with more, a call takes seconds and shows nothing new
SLOWER = 1.05


def every(axes: Mapping[str, tuple]) -> list[Point]:
    """All points of the grid."""
    return [_point(row) for row in _rows(axes)]


def sample(axes: Mapping[str, tuple]) -> list[Point]:
    """Few points in which every pair of values of two axes occurs, and all eight corners of tokens x experts x top_k.

    Greedy: each next point is the one with most pairs that no point has yet, and of those the one whose values were
    used least; corners first. No chance is in it.
    """
    rows = _rows(axes)
    left = set().union(*map(_pairs, rows))
    ends = set(itertools.product(*((axes[name][0], axes[name][-1]) for name in CORNERS)))
    used: Counter[tuple] = Counter()
    chosen = []
    while left:
        wanted = [row for row in rows if tuple(row[name] for name in CORNERS) in ends] if ends else rows
        best = max(wanted, key=lambda row: (len(_pairs(row) & left), -sum(used[each] for each in row.items())))
        used.update(best.items())
        ends.discard(tuple(best[name] for name in CORNERS))
        left -= _pairs(best)
        chosen.append(_point(best))
    return chosen


def _rows(axes: Mapping[str, tuple]) -> list[dict[str, Any]]:
    rows = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    return [row for row in rows if row["tokens"] * row["top_k"] * math.prod(row["width"]) <= MOST_WORK]


def _pairs(row: dict[str, Any]) -> set[tuple]:
    return set(itertools.combinations(row.items(), 2))


def _point(row: dict[str, Any]) -> Point:
    dim, hidden = row["width"]
    return Point(dim=dim, hidden=hidden, **{name: value for name, value in row.items() if name != "width"})


def run(
    points: Sequence[Point], measure: Callable[[Point], dict[str, Any]], out: Path, where: dict[str, str], limit: float
) -> Iterator[dict[str, Any]]:
    """What was found at each point: from ``out``, if the same machine and versions wrote it, or measured and added.

    Stops, with a word on stderr, at the first point that is to be measured after ``limit`` seconds.
    """
    began = time.monotonic()
    before = {}
    if out.exists():
        for line in out.read_text(encoding="utf-8").splitlines():
            try:
                found = json.loads(line)
            except ValueError:
                continue  # the line at which a run was killed
            if found["where"] == where:
                before[Point(**found["point"])] = found
    if known := sum(point in before for point in points):
        print(f"{known} of {len(points)} points are in {out}; delete it to measure them again", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    for number, point in enumerate(points, start=1):
        if point not in before:
            if time.monotonic() - began > limit:
                print(f"stopped before point {number} of {len(points)}; the same command goes on", file=sys.stderr)
                return
            print(f"[{number}/{len(points)}] {asdict(point)}", file=sys.stderr, flush=True)
            before[point] = {"where": where, **measure(point)}
            with out.open("a", encoding="utf-8") as file:
                file.write("\n" + json.dumps(before[point]))
        yield before[point]


def worst(found: list[dict[str, Any]]) -> str:
    """How many points are slower than 1.05x the best peer, and which, worst first."""
    slow = [each for each in found if each["ratio"][each["best"]][1] < 1 / SLOWER]
    lines = [f"slower than {SLOWER}x the best peer: {len(slow)} of {len(found)} points"]
    for each in sorted(slow, key=lambda each: each["ratio"][each["best"]][1]):
        point, (low, middle, high) = Point(**each["point"]), each["ratio"][each["best"]]
        lines.append(
            f"  {1 / middle:.2f}x ({1 / high:.2f}-{1 / low:.2f}) of {each['best']} at T,D,H,E,K = {point.size}, "
            f"skew {point.skew:g}, {point.dtype}, {point.threads} thread(s)"
        )
    return "\n".join(lines)
