"""A plan as one HTML page with figures: what each strategy costs, where the time goes, who waits, how it grows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from ..report.data.formatting import clean, clip
from ..report.html.figures import Figure
from ..report.html.page import figures_page, write_file
from ..report.html.widgets import Cell, Part, Section, Widgets, table
from .cost import StepTime
from .forecast import Forecast, Growth, Row
from .straggler import slowest
from .text import against, assumptions, headline, percent, seconds, size
from .typical_skews import Strategy

__all__ = ["render_page", "write_page"]

CAUSES: tuple[tuple[str, str, Callable[[StepTime], float]], ...] = (  # name, colour, seconds
    ("dense", "@s0", lambda one: one.dense),
    ("experts", "@s1", lambda one: one.experts),
    ("all-to-all", "@s3", lambda one: one.all_to_all),
    ("gradients", "@s7", lambda one: one.gradients),
    ("wait for the slowest rank", "@s2", lambda one: one.straggler),
    ("wait for the slowest group", "@s5", lambda one: one.groups),
    ("sums of loads", "@s6", lambda one: one.balance_sums),
)
WASTE = 4  # causes that even load has not; of these the chart of what is beyond it is made
BINS, QUANTILES = 80, 81
STEEP = 30  # times as much at one place as at another: from there on the axis is logarithmic
TICKS = [m * 10**e for e in range(-2, 5) for m in (1, 2, 5)]


def write_page(plan: Forecast, strategies: Sequence[Strategy], path: str | Path) -> Path:
    """Writes the page atomically and returns its path.

    Args:
        strategies: those that ``plan`` was made for, whose loads are drawn again.

    Raises ConfigError if plotly or jinja2 is missing, OutputError if the file cannot be written.
    """
    return write_file(path, render_page(plan, strategies))


def render_page(plan: Forecast, strategies: Sequence[Strategy]) -> str:
    """The page as text; see `write_page`."""
    widgets, c = Widgets(), plan.cluster
    sections = [_costs(plan, widgets), _time(plan, widgets), _waits(plan, strategies, widgets)]
    sections += [_growth(plan, widgets)] if plan.growth else []
    sections.append(Section("Assumed", "", [("points", {"texts": list(assumptions(plan))})]))
    facts = [
        f"{c.gpus:,} GPUs, {c.ep} sharing out the experts of a layer",
        f"{c.layers} MoE layers of {c.experts} experts, top-{c.top_k}",
        f"{c.micro_batches} micro-batches of {c.tokens:,} tokens a step",
    ]
    return figures_page(
        "figures.html.jinja", widgets, [one.name for one in plan.rows], [""] * len(plan.rows),
        title="what imbalance costs", mark="what imbalance costs on a cluster", headline=headline(plan), quality="",
        facts=facts, warnings=plan.notes, problems=[], sections=sections, version=_version(),
    )  # fmt: skip


def _costs(plan: Forecast, widgets: Widgets) -> Section:
    base = next((one for one in plan.rows if one.name == "micro"), None)
    heads = ["Strategy", "Slowest / mean", "Seconds a step", "Against even load", *(["Against micro"] if base else []),
             "Experts' memory", "More than even"]  # fmt: skip
    even = plan.rows[0].memory.even
    blank = [Cell("–", "")]
    rows = [[Cell("even load"), Cell("1", 1), Cell(seconds(plan.even.total), plan.even.total), Cell("0.0%", 0),
             *(blank if base else []), Cell(size(even), even), Cell("0.0%", 0)]]  # fmt: skip
    for index, one in enumerate(plan.rows):
        factor, more = one.straggler, one.memory.fullest / one.memory.even - 1
        rows.append([
            Cell(one.name, colour=index),
            Cell(f"{factor.mean:.3f}", factor.mean, [("", f"± {factor.error:.3f}")]),
            Cell(seconds(one.time.total), one.time.total), _percent_cell(one.cost),
            *([_percent_cell(against(one, base))] if base else []),
            Cell(size(one.memory.fullest), one.memory.fullest), _percent_cell(more),
        ])  # fmt: skip
    lead = (
        "Slowest / mean: load of a group's slowest rank in a layer and micro-batch, mean ± standard error of the "
        "simulation. Memory: activations of routed experts on the fullest GPU."
    )
    title = "What each strategy costs"
    beyond = CAUSES[WASTE:]
    bars = _bars([("Seconds of a step beyond even load", plan.rows, beyond, 1.0, ""),
                  ("Step time beyond even load, %", plan.rows, beyond, 100 / plan.even.total, "%")])  # fmt: skip
    return Section(title, lead, [table("costs", "what each strategy costs", heads, rows),
                                 widgets.lines("beyond", title, bars)])  # fmt: skip


def _time(plan: Forecast, widgets: Widgets) -> Section:
    lead = (
        "All of a step by cause. Waits are what uneven loads add; where computation hides a part of the exchange or of "
        "the sum of gradients, only the rest is here."
    )
    even = ("even load", plan.even)
    bars = _bars([("Seconds of a step", plan.rows, CAUSES, 1.0, "")], first=even)
    title = "Where the time goes"
    return Section(title, lead, [widgets.lines("time", title, bars)])


def _waits(plan: Forecast, strategies: Sequence[Strategy], widgets: Widgets) -> Section:
    drawn = [slowest(one.loads, plan.cluster, seed=plan.seed).ravel() for one in strategies]
    edges = np.linspace(1.0, max(1.01, *(float(factors.max()) for factors in drawn)), BINS + 1)
    middle, rest = (edges[:-1] + edges[1:]) / 2, np.linspace(0, 1, QUANTILES)
    often, at_least = [], []
    for index, factors in enumerate(drawn):
        counts, _ = np.histogram(factors, edges)
        end = min(BINS, 2 + int(np.flatnonzero(counts)[-1]))  # so that the chart fits those that are shown
        often.append(_line(index, middle[:end], 100 * counts[:end] / len(factors), shape="hvh", fill=True))
        at_least.append(_line(index, np.quantile(factors, rest), 100 * (1 - rest)))
    title = "How long the others wait"
    lead = (
        "Load of a group's slowest rank over the mean of its ranks, which every rank of the group waits for, in each "
        "simulated layer and micro-batch: at 1.5 a layer takes half as long again. A long tail is a few bad moments, "
        "a hump far from 1 is every moment."
    )
    axis = {"title": {"text": "slowest / mean"}}
    views = [
        _view("How often, % of layers and micro-batches", often, axis, {"rangemode": "tozero"}),
        _view("At least so much, % of layers and micro-batches", at_least, axis, {"range": [0, 102]}),
    ]
    return Section(title, lead, [widgets.lines("waits", title, {"views": views, "height": 330}, _chips(plan))])


def _growth(plan: Forecast, widgets: Widgets) -> Section:
    ranks = [one.ep for one in plan.growth]
    axis = {"title": {"text": "ranks that share out the experts of a layer"}, "type": "log", "tickvals": ranks,
            "ticktext": [f"{ep:,}" for ep in ranks]}  # fmt: skip
    choices: tuple[tuple[str, Callable[[Row], float]], ...] = (
        ("Step time beyond even load, %", lambda one: 100 * one.cost),
        ("Slowest / mean load", lambda one: one.straggler.mean),
        ("Seconds a step", lambda one: one.time.total),
        ("Memory of the fullest GPU beyond even, %", lambda one: 100 * (one.memory.fullest / one.memory.even - 1)),
    )
    views = []
    for label, read in choices:
        lines = [
            _line(index, ranks, [read(grown.rows[index]) for grown in plan.growth], mode="lines+markers")
            for index in range(len(plan.rows))
        ]
        views.append(_view(label, lines, axis, _upright([value for line in lines for value in line["y"]])))
    lead = (
        "The same strategies where more ranks share out the experts of a layer. GPUs grow with them, and so does the "
        "text that a group routes together, which evens loads out; but each rank holds fewer experts."
    )
    title = "How it grows with the ranks"
    inner = _growth_table(plan.growth)
    return Section(title, lead, [widgets.lines("growth", title, {"views": views, "height": 330}, _chips(plan)),
                                 ("fold", {"summary": "All numbers", "inner": inner, "open": False})])  # fmt: skip


def _upright(values: Sequence[float]) -> dict[str, Any]:
    """A vertical axis from zero, or a logarithmic one."""
    if min(values) > 0 and max(values) > STEEP * min(values):
        return {"type": "log", "tickvals": TICKS, "ticktext": [f"{tick:,g}" for tick in TICKS]}
    return {"rangemode": "tozero"}


def _growth_table(growth: Sequence[Growth]) -> Part:
    heads = ["Ranks", "GPUs", "Experts per rank", *(clip(clean(one.name), 24) for one in growth[0].rows)]
    rows = []
    for one in growth:
        held = str(one.experts_per_rank) if one.replicas == 1 else f"1/{one.replicas}"
        cells = [
            Cell(f"{row.straggler.mean:.2f}", row.straggler.mean, [("", percent(row.cost, sign=True))])
            for row in one.rows
        ]
        rows.append([Cell(f"{one.ep:,}", one.ep), Cell(f"{one.gpus:,}", one.gpus), Cell(held), *cells])
    label = "slowest / mean load, and small the step's time over even load, by ranks"
    return table("growth", label, heads, rows)


def _bars(
    choices: Sequence[tuple[str, Sequence[Row], Sequence[tuple[str, str, Callable[[StepTime], float]]], float, str]],
    first: tuple[str, StepTime] | None = None,
) -> Figure:
    """Stacked bars, one a strategy, a part a cause.

    Args:
        choices: for each view its label, rows, causes, a factor to multiply seconds by, and the unit after it.
        first: the name and time of a bar above those of the rows.
    """
    views, deepest = [], 0
    for label, rows, causes, factor, unit in choices:
        named = [*([first] if first else []), *((one.name, one.time) for one in rows)]
        names = _unique([name for name, _ in named])
        deepest = max(deepest, len(names))
        data = [
            {"type": "bar", "orientation": "h", "name": cause, "marker": {"color": colour}, "showlegend": True,
             "y": names, "x": [_short(factor * read(time)) for _, time in named],
             "hovertemplate": f"%{{x:.3~g}}{unit}"}
            for cause, colour, read in causes
            if any(read(time) > 0 for _, time in named)
        ]  # fmt: skip
        layout = {
            "xaxis": {"title": {"text": label}, "rangemode": "tozero", "showgrid": True},
            "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
            "barmode": "stack", "bargap": 0.35, "showlegend": True, "hovermode": "y unified",
            "legend": {"traceorder": "normal"},
        }  # fmt: skip
        views.append({"label": label, "data": data, "layout": layout})
    return {"views": views, "height": 110 + 34 * deepest, "rows": deepest}


def _unique(names: Sequence[str]) -> list[str]:
    """Names as Plotly reads them, each once: two bars of one name would be one."""
    found: list[str] = []
    for name in names:
        short = clip(clean(name), 24) or "–"
        while short in found:
            short += " "
        found.append(short)
    return [escape(one, quote=False) for one in found]


def _line(
    index: int, x: Any, y: Any, *, mode: str = "lines", shape: str = "linear", fill: bool = False
) -> dict[str, Any]:
    color = f"@s{index}"
    more = {"fill": "tozeroy", "fillcolor": f"{color}/0.12"} if fill else {}
    return {
        "type": "scatter", "mode": mode, "x": list(map(_short, x)), "y": list(map(_short, y)), "s": index,
        "showlegend": False, "line": {"color": color, "width": 2, "shape": shape}, "hovertemplate": "%{y:.3~g}",
        "marker": {"size": 6, "color": color},
    } | more  # fmt: skip


def _view(label: str, data: list[dict[str, Any]], xaxis: dict[str, Any], yaxis: dict[str, Any]) -> dict[str, Any]:
    return {"label": label, "data": data, "layout": {"xaxis": xaxis, "yaxis": yaxis, "hovermode": "x unified"}}


def _chips(plan: Forecast) -> list[tuple[str, str]]:
    return [(one.name, "") for one in plan.rows] if len(plan.rows) > 1 else []


def _percent_cell(value: float) -> Cell:
    return Cell(percent(value, sign=True), value)


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _version() -> str:
    try:
        return version("equipoise")
    except PackageNotFoundError:  # a source tree that is not installed
        return ""
