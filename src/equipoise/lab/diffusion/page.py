"""A comparison of diffusion runs as one HTML file without scripts: equal runs give equal bytes."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...report.data.formatting import clean, number
from ...report.html.pictures import WIDE, Picture, Text, dots, round_numbers, scale, through
from ...report.html.rendering import render
from ...report.html.widgets import Cell, Part, Section, table
from ...storage.files import atomic_write
from ..comparison.page_parts import COLOURS, STYLES, difference_cell, expert_map, keys, origin
from .png import decode_size
from .summary import Compared, StrategySummary
from .trainer import SAMPLES_NAME

__all__ = ["render_html", "write_html"]

PIXELS = 6  # on a side for one of a small image


def write_html(compared: Compared, path: Path) -> None:
    """Raises OutputError where the file cannot be written, ConfigError where jinja2 is missing."""
    atomic_write(path, render_html(compared).encode(), do="free disk space, or name another folder with --out")


def render_html(compared: Compared) -> str:
    """The page as text."""
    c, many = compared, len(compared.strategies)
    seeds = {run.header.seed for one in c.strategies for run in one.runs}
    header = c.strategies[0].runs[0].header
    train, layers = header.config["train"], header.num_layers
    experts = max(one.runs[0].header.num_experts for one in c.strategies)
    facts = [
        f"{many} {'strategy' if many == 1 else 'strategies'} × {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        f"{c.step} steps of {train['images']} images",
        f"{layers} {'layer' if layers == 1 else 'layers'} of {experts} experts",
        "images of a folder" if header.config["data"]["data"] else "digits of scikit-learn",
    ]
    sections = [
        Section("Error by noise level", ERROR, [keys(c.strategies), _charts(_error_charts(c))]),
        Section("Which experts compute which noise level", MAPS, [("maps", {"rows": _maps(c)})]),
        Section("Experts for a token", TOKEN, [keys(c.strategies), _charts([_experts_chart(c)])]),
        Section("Numbers", NUMBERS, [_numbers(c)]),
        Section("Images drawn", DRAWN, [("drawn", {"pictures": _drawn(c)})]),
        Section("Where this comes from", "", origin(c.strategies)),
    ]
    return render(
        "small_runs.html.jinja", "equipoise.lab.comparison", title=" · ".join(one.name for one in c.strategies[:4]),
        headline=c.headline, quality="", facts=facts, sections=sections, problems=c.problems,
        styles=STYLES, mark="experts of diffusion transformers", command="diffuse",
    )  # fmt: skip


ERROR = """\
Squared error of the velocity that the model predicts, per pixel, on images that were not trained on. At 0 an image is
clean, at 1 it is noise alone. Bands hold all seeds; those of differences, paired by seed, are 95 % intervals."""
MAPS = """\
Each row is an interval of noise levels, each column an expert, in the order of the noise levels that it computes.
Colour: the share of the level's tokens that the expert takes, over the even share; the first seed."""
TOKEN = """\
How many experts compute a token, mean over layers. Where tokens choose it is the same for each. Where experts choose
from one image it is the same on average of every image; from a pool of many it may differ between noise levels."""
NUMBERS = """\
Means over seeds. Information: nats between expert and noise level, 0 where every level uses all experts alike. MaxVio:
fullest expert over its even share, minus 1, of all held-out tokens and of single images."""
DRAWN = "A row for each class, from the same noise for all strategies; the first seed."


def _charts(charts: Sequence[tuple[str, str, Picture]]) -> Part:
    return "charts", {"charts": charts}


def _error_charts(compared: Compared) -> list[tuple[str, str, Picture]]:
    curves = [
        (f"of{at % COLOURS}", [one.mean for one in s.by_level], [(one.low, one.high) for one in s.by_level])
        for at, s in enumerate(compared.strategies)
    ]
    found = [("Error", "squared error per pixel", _chart(compared.levels, curves, "errors by noise level"))]
    against = []
    for at, one in enumerate(compared.strategies):
        known = [difference for difference in one.level_differences if difference is not None]
        if len(known) == len(compared.levels):
            bounds = [(d.low, d.high) for d in known]
            against.append((f"of{at % COLOURS}", [d.mean for d in known], bounds))
    if against:
        title = f"Difference from {clean(compared.baseline)}"
        picture = _chart(compared.levels, against, f"{title} by noise level", zero=True)
        found.append((title, "below 0 is better", picture))
    return found


def _experts_chart(compared: Compared) -> tuple[str, str, Picture]:
    curves = [(f"of{at % COLOURS}", one.experts_per_token, []) for at, one in enumerate(compared.strategies)]
    return "Experts per token", "mean over layers", _chart(compared.levels, curves, "experts per token", zero=True)


def _chart(
    levels: Sequence[float],
    curves: Sequence[tuple[str, Sequence[float], Sequence[tuple[float | None, float | None]]]],
    label: str,
    *,
    zero: bool = False,
) -> Picture:
    """Lines over noise levels: (CSS class, values, bounds). ``zero``: the vertical axis holds it."""
    ends = [value for _, values, _ in curves for value in values]
    ends += [value for *_, bounds in curves for pair in bounds for value in pair if value is not None]
    ends = [value for value in ends if math.isfinite(value)] + [0.0] * zero
    low, high = (min(ends), max(ends)) if ends else (0.0, 1.0)
    room = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
    right = WIDE - 16
    x, y = scale(0.0, 1.0, 88, right), scale(low - room, high + room, 236, 16)
    ticks = round_numbers(low - room, high + room)
    paths = [("grid", "".join(f"M88 {y(tick)}H{right}" for tick in ticks))]
    paths += [("zero", f"M88 {y(0)}H{right}")] * zero
    texts: list[Text] = [("end", 76, y(tick) + 8, f"{tick:g}") for tick in ticks]
    texts += [("start", 88, 272, "clean"), ("", (88 + right) // 2, 272, "noise level"), ("end", right, 272, "noise")]
    for name, values, bounds in curves:
        points = [(x(level), y(value)) for level, value in zip(levels, values, strict=True) if math.isfinite(value)]
        band = [(x(level), y(lower), y(upper)) for level, (lower, upper) in zip(levels, bounds, strict=False)
                if lower is not None and upper is not None and math.isfinite(lower + upper)]  # fmt: skip
        if band:
            upper, lower = [(at, top) for at, _, top in band], [(at, under) for at, under, _ in band]
            paths.append((f"band {name}", f"{through(upper + lower[::-1])}z"))
        if points:
            paths += [(f"line {name}", through(points)), (f"dots {name}", dots(points))]
    return Picture("chart", WIDE, 280, paths, texts, label=label)


def _maps(compared: Compared) -> list[dict[str, Any]]:
    """A row of maps, one for each layer, for each strategy with experts."""
    return [
        {"name": one.name, "colour": at % COLOURS,
         "maps": [(f"layer {2 * layer + 1}", _map(share, compared.levels)) for layer, share in enumerate(one.share)]}
        for at, one in enumerate(compared.strategies)
        if len(one.share[0][0]) > 1
    ]  # fmt: skip


def _map(share: Sequence[Sequence[float]], levels: Sequence[float]) -> Picture:
    """Cells of a layer, [level][expert], experts in the order of the mean noise level of their tokens."""
    cells_DE = np.asarray(share)
    total_E = cells_DE.sum(axis=0)
    centre_E = np.where(total_E > 0, np.asarray(levels) @ cells_DE / np.maximum(total_E, 1e-12), 2.0)
    order = np.argsort(centre_E, kind="stable").tolist()
    said = f"share of the tokens of {len(levels)} noise levels that each of {len(order)} experts takes"
    return expert_map(cells_DE.tolist(), [f"{level:g}" for level in levels], order, said)


def _numbers(compared: Compared) -> Part:
    heads = ["Strategy", "Error", f"Against {clean(compared.baseline)}", "Experts per token", "Information", "MaxVio",
             "of an image", "Parameters active", "of all"]  # fmt: skip
    return table("numbers", "numbers of each strategy", heads,
                 [_row(one, at) for at, one in enumerate(compared.strategies)])  # fmt: skip


def _row(one: StrategySummary, at: int) -> list[Cell]:
    header = one.runs[0].header
    low, high = min(one.experts_per_token), max(one.experts_per_token)
    spread = f"{number(low, 2)} to {number(high, 2)}" if high - low > 0.005 else ""
    return [
        Cell(one.name, colour=at),
        Cell(number(one.loss.mean, 4), one.loss.mean, [("", f"{one.loss.n} {'seed' if one.loss.n == 1 else 'seeds'}")]),
        difference_cell(one.difference),
        Cell(number(float(np.mean(one.experts_per_token)), 2), small=[("", spread)] if spread else []),
        Cell(number(one.information.mean, 3)),
        Cell(number(one.maxvio.mean, 2)),
        Cell(number(one.maxvio_sequence.mean, 2)),
        Cell(f"{header.active_parameters / 1e3:,.0f} K"),
        Cell(f"{header.parameters / 1e3:,.0f} K"),
    ]


def _drawn(compared: Compared) -> list[dict[str, Any]]:
    """The picture of each strategy's first seed, where it has drawn one."""
    found = []
    for at, one in enumerate(compared.strategies):
        path = one.runs[0].path / SAMPLES_NAME
        try:
            png = path.read_bytes()
            wide, high = decode_size(png)
        except (OSError, ValueError):
            continue  # it is still training, or draws nothing
        data = base64.b64encode(png).decode()
        factor = max(1, min(PIXELS, 420 // wide))
        found.append({"name": one.name, "colour": at % COLOURS, "data": data, "wide": wide * factor,
                      "high": high * factor})  # fmt: skip
    return found
