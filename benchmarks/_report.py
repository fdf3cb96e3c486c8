"""What every table here begins with and is made of: machine and versions, medians, quartiles, ratios of pairs.

A benchmark with ``--json FILE`` also writes its figures there, which ``bench.py`` puts on a page.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["add_json", "figure", "machine", "pairs", "quartiles", "ratio", "save", "span", "versions"]


def machine() -> str:
    """The processor's name and the number of its cores."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {os.cpu_count()} core(s)"


def versions(*packages: str) -> str:
    """Python's and the packages' versions; of one that is not installed, that.

    >>> versions("no-such-package")  # doctest: +ELLIPSIS
    'Python 3..., no no-such-package'
    """
    said = [f"Python {platform.python_version()}"]
    for name in packages:
        try:
            said.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            said.append(f"no {name}")
    return ", ".join(said)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """(lower quartile, median, upper quartile); one value is all three."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def span(values: Sequence[float], digits: int | None = None) -> str:
    """``median low-high``: 3 digits, or so many behind the point.

    >>> span([1.0, 2.0, 3.0]), span([100.0, 200.0, 300.0])
    ('2.00 1.50-2.50', '200 150-250')
    """
    low, middle, high = quartiles(values)
    digits = (2 if middle < 10 else 1 if middle < 100 else 0) if digits is None else digits
    return f"{middle:.{digits}f} {low:.{digits}f}-{high:.{digits}f}"


def pairs(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """The ratio inside each round: what slows the whole machine down falls out."""
    return [a / b for a, b in zip(above, below, strict=True)]


def ratio(above: Sequence[float], below: Sequence[float]) -> str:
    """``median`` and quartiles of `pairs`, with an x.

    >>> ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
    '2.00x 2.00-2.50'
    """
    low, middle, high = quartiles(pairs(above, below))
    return f"{middle:.2f}x {low:.2f}-{high:.2f}"


def figure(
    title: str,
    unit: str,
    bars: Sequence[tuple[str, Sequence[float]]],
    note: str = "",
) -> dict[str, Any]:
    """Bars of a page, from zero.

    Args:
        bars: (name, its quartiles); a bar ends at the median, a thin line spans the other two.

    >>> figure("a step", "ms", [("ours", quartiles([1.0, 2.0, 3.0]))])["bars"]
    [('ours', (1.5, 2.0, 2.5))]
    """
    return {"title": title, "unit": unit, "note": note, "bars": list(bars)}


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too, for bench.py")


def save(path: Path | None, figures: Sequence[dict[str, Any]]) -> None:
    """Writes the figures, where somebody asked for them."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(list(figures)), encoding="utf-8")
