"""The figures of the report as Plotly figures for a notebook, with the same data and colours."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError, DataError, unknown_name
from ...storage.inspection_record import Inspection
from ...storage.run_record import Run
from ..data.comparison import Comparison
from ..data.formatting import clean
from ..data.inspections import name_inspections
from ..data.load import load
from ..data.summarize import summarize
from ..html import figures
from ..html import heatmaps as maps
from ..html.figures import Figure
from ..html.heatmaps import Map

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

__all__ = ["Source", "curves", "domains", "load_over_time", "loads", "maxvio"]

Source = str | Path | Run | Inspection | Comparison
# The colours of the page's style sheet (a test compares the two): strategies first, then the rest
LIGHT = {"s0": "#7b818a", "s1": "#2563d9", "s2": "#d0640a", "s3": "#0b8a72", "s4": "#8a4fc7", "s5": "#c22f6d",
         "s6": "#7d7a00", "s7": "#0787b5", "muted": "#6b717a", "ink": "#1b1d21", "grid": "#ececea", "paper": "#fcfcfb",
         "share-low": "#4a78b8", "share-even": "#f4f3ef", "share-high": "#d9762b", "share-top": "#8c2d04"}  # fmt: skip
DARK = {"s0": "#9aa1ab", "s1": "#6b9cf5", "s2": "#f29a4b", "s3": "#3fc4a6", "s4": "#b78be8", "s5": "#ee6fa2",
        "s6": "#c2bd45", "s7": "#4fbce4", "muted": "#8f969f", "ink": "#e8e9eb", "grid": "#25292e", "paper": "#131518",
        "share-low": "#4f86cc", "share-even": "#23272c", "share-high": "#e0802f", "share-top": "#ffd9a0"}  # fmt: skip


def curves(source: Source | Sequence[Source], metric: str = "perplexity", *, dark: bool = False) -> PlotlyFigure:
    """One metric over the steps: a line per strategy over a band from its lowest to its highest seed.

    Args:
        source: a folder of a run or comparison, a run of ``load_runs``, or a ``Comparison``; one or a sequence of them.
        metric: "perplexity" (on held-out text), "loss", "lr", "grad_norm", "tokens_per_second", or a key of
            ``Balancer.metrics()``, e.g. "balance/maxvio_global".
        dark: for a dark notebook.

    Raises ConfigError for a metric that was not recorded, or if plotly is missing; DataError if nothing can be read.

    Example:
        >>> from pathlib import Path
        >>> from equipoise import plot
        >>> from equipoise.storage.run_record import Header, Run, Step
        >>> header = Header("global", [], 0, {}, 1, 4, 2, ["text"], "", {}, 1, 1, "2026-01-01")
        >>> steps = [Step(n, 3.0 / n, 1e-3, 1.0, 512, 0.1, {"balance/maxvio_global": 0.5 / n}) for n in (1, 2, 3)]
        >>> figure = plot.curves(Run(Path("run"), header, steps), "balance/maxvio_global")
        >>> [round(value, 3) for value in figure.data[0].y]
        [0.5, 0.25, 0.167]
    """
    comparison = _comparison(source)
    if metric == "perplexity":
        figure, label = figures.perplexity_curves(comparison), "Mean of all domains"
    else:
        figure, label = figures.training_curves(comparison), figures.metric_name(metric)
    views = {view["label"]: view for view in (figure or {"views": []})["views"]}
    if label not in views:
        known = {name: label for name in _metrics(comparison) if (label := figures.metric_name(name)) in views}
        raise unknown_name("recorded metric", metric, known)
    names = [one.name for one in comparison.strategies]
    return _lines(views[label], label, names, figure, dark)


def maxvio(source: Source | Sequence[Source], scope: str = "global", *, dark: bool = False) -> PlotlyFigure:
    """MaxVio (largest load of an expert over the mean load, minus 1) over the steps, and that of random routing.

    Args:
        source: as in `curves`. scope: "global", "micro_batch" or "sequence". dark: for a dark notebook.

    Raises ConfigError for another scope, one that was not recorded, or if plotly is missing.

    Example:
        >>> from equipoise import plot
        >>> plot.maxvio("no/such/run")
        Traceback (most recent call last):
        equipoise.errors.DataError: expected a run record at no/such/run ...
    """
    scopes = ("global", "micro_batch", "sequence")
    if scope not in scopes:
        raise unknown_name("scope of MaxVio", scope, scopes)
    return curves(source, f"balance/maxvio_{scope}", dark=dark)


def loads(source: Source | Sequence[Source], strategy: str | None = None, *, dark: bool = False) -> PlotlyFigure:
    """Layer × expert load of one strategy, with a slider over the recorded steps.

    Args:
        source: as in `curves`. strategy: its name; None takes the only one, or the baseline.
        dark: for a dark notebook.

    Returns a figure with one frame per recorded step; a cell is the load over the mean of its layer, 1 is even.
    Raises ConfigError for an unknown strategy, DataError if no load was recorded.

    Example:
        >>> from pathlib import Path
        >>> from equipoise import plot
        >>> from equipoise.storage.run_record import Header, Load, Run
        >>> header = Header("global", [], 0, {}, 1, 4, 2, ["text"], "", {}, 1, 1, "2026-01-01")
        >>> plot.loads(Run(Path("run"), header, loads=[Load(5, [[4, 8, 2, 2]])])).data[0].z[0]
        [1.0, 2.0, 0.5, 0.5]
    """
    import_plotly()
    comparison = _comparison(source)
    name = _strategy(comparison, strategy)
    _, found = maps.load_maps(comparison)
    figure = found[[one.name for one in comparison.strategies].index(name)]
    if figure is None:
        raise DataError(expected=f"stored loads of {name}", got="none", do="train with train.load_every above 0")
    return _heat_map(figure, f"Load of every expert: {name}", dark)


def load_over_time(
    source: Source | Sequence[Source], layer: int = 0, strategy: str | None = None, *, dark: bool = False
) -> PlotlyFigure:
    """Expert × step load of one layer: whether its experts become balanced.

    Args:
        source, strategy, dark: as in `loads`. layer: counted from 0.

    Raises ConfigError for an unknown layer or strategy, DataError if no load was recorded.

    Example:
        >>> from pathlib import Path
        >>> from equipoise import plot
        >>> from equipoise.storage.run_record import Header, Load, Run
        >>> header = Header("global", [], 0, {}, 1, 4, 2, ["text"], "", {}, 1, 1, "2026-01-01")
        >>> stored = [Load(5, [[8, 8, 0, 0]]), Load(10, [[4, 4, 4, 4]])]
        >>> plot.load_over_time(Run(Path("run"), header, loads=stored)).data[0].z[0]  # of expert 0
        [2.0, 1.0]
    """
    import_plotly()
    comparison = _comparison(source)
    name = _strategy(comparison, strategy)
    stored = [one for one in comparison[name].charts.loads if one.step]
    if not stored:
        raise DataError(expected=f"stored loads of {name}", got="none", do="train with train.load_every above 0")
    if not 0 <= layer < len(stored[0].share):
        raise ConfigError(expected=f"a layer from 0 to {len(stored[0].share) - 1}", got=str(layer), do="choose another")
    cells_ET = np.array([one.share[layer] for one in stored]).T
    figure = maps.heat_map([maps.view(f"layer {layer}", cells_ET)], list(map(str, range(len(cells_ET)))),
                           top=maps.top_of([cells_ET]), row="expert", cell="step", column="step",
                           columns=[str(one.step) for one in stored])  # fmt: skip
    assert figure is not None
    return _heat_map(figure, f"Load of layer {layer} over time: {name}", dark)


def domains(source: Source | Sequence[Source], strategy: str | None = None, *, dark: bool = False) -> PlotlyFigure:
    """Expert × domain map with a slider over layers: which domains choose which expert.

    Args:
        source: as in `curves`, or an inspection: its folder, or the result of ``read_inspection``.
        strategy: its name; for several inspections, the name of one. dark: for a dark notebook.

    Returns a figure with one frame per layer; a cell is how often a domain chooses the expert, over uniform routing.
    Raises ConfigError for an unknown name, DataError if nothing was measured.

    Example:
        >>> from equipoise import plot
        >>> plot.domains([])
        Traceback (most recent call last):
        equipoise.errors.DataError: expected a run or an inspection
          got: nothing
          do:  pass a folder, or what load_runs or read_inspection returned
    """
    import_plotly()
    runs, inspections = _read(source)
    if inspections and not runs:
        found = {one.name: one.inspection for one in name_inspections(inspections)}
        if strategy is not None and strategy not in found:
            raise unknown_name("inspection", strategy, found)
        name = strategy or next(iter(found))
        one = found[name]
        uniform_L = np.array([layer.top_k / layer.num_experts for layer in one.layers])
        cells_LDE = one.frequency_DLE().transpose(1, 0, 2) / uniform_L[:, None, None]
        views = [
            maps.by_domain(f"layer {i}", cells_LDE[i, :, : layer.num_experts]) for i, layer in enumerate(one.layers)
        ]
        figure = maps.heat_map(views, [domain.name for domain in one.domains], top=maps.top_of([cells_LDE]),
                               row="domain", column="experts, by the domain they favour")  # fmt: skip
    else:
        comparison = _comparison(source)
        name = _strategy(comparison, strategy)
        _, every = maps.domain_maps(comparison)
        figure = every[[one.name for one in comparison.strategies].index(name)]
    if figure is None:
        raise DataError(expected=f"an evaluation of {name}", got="none", do="train until the first evaluation")
    return _heat_map(figure, f"What the experts specialize in: {name}", dark)


def import_plotly() -> Any:
    try:
        from plotly import graph_objects
    except ImportError:
        raise ConfigError(expected="plotly, which draws the figures", got="it is not installed",
                          do="pip install 'equipoise[report]'") from None  # fmt: skip
    return graph_objects


def _read(source: Source | Sequence[Source]) -> tuple[list[Run], list[Inspection]]:
    runs: list[Run] = []
    inspections: list[Inspection] = []
    for one in [source] if isinstance(source, str | Path | Run | Inspection | Comparison) else source:
        match one:
            case Run():
                runs.append(one)
            case Inspection():
                inspections.append(one)
            case str() | Path():
                more, looks, _ = load([one])
                runs += more
                inspections += looks
            case _:
                pass  # a comparison has been summarized already
    if not runs and not inspections and not isinstance(source, Comparison):
        raise DataError(expected="a run or an inspection", got="nothing",
                        do="pass a folder, or what load_runs or read_inspection returned")  # fmt: skip
    return runs, inspections


def _comparison(source: Source | Sequence[Source]) -> Comparison:
    if isinstance(source, Comparison):
        return source
    runs, _ = _read(source)
    if not runs:
        raise DataError(expected="a run", got="inspections only", do="pass a run, or plot.domains(...)")
    return summarize(runs)


def _strategy(comparison: Comparison, wanted: str | None) -> str:
    names = [one.name for one in comparison.strategies]
    if wanted is not None and wanted not in names:
        raise unknown_name("strategy of these runs", wanted, names)
    return wanted or comparison.baseline


def _metrics(comparison: Comparison) -> list[str]:
    return ["perplexity", *dict.fromkeys(name for one in comparison.strategies for name in one.charts.training)]


def _painted(value: Any, colours: dict[str, str]) -> Any:
    """Replaces the page's names of colours ("@s1", "@s1/0.16") by colours."""
    if isinstance(value, dict):
        return {key: _painted(one, colours) for key, one in value.items()}
    if isinstance(value, str) and (found := re.fullmatch(r"@([a-z0-9-]+)(?:/([\d.]+))?", value)):
        name, alpha = found.groups()
        if number := re.fullmatch(r"s(\d+)", name):
            index = int(number[1])
            name = f"s{index if index < 8 else 1 + (index - 1) % 7}"
        code = colours[name]
        return f"rgba({int(code[1:3], 16)},{int(code[3:5], 16)},{int(code[5:], 16)},{alpha})" if alpha else code
    return value


def _lines(view: dict[str, Any], title: str, names: list[str], figure: Figure | None, dark: bool) -> PlotlyFigure:
    go, colours = import_plotly(), DARK if dark else LIGHT
    made = []
    for spec in view["data"]:
        trace = _painted({key: value for key, value in spec.items() if key != "s"}, colours)
        if spec.get("s") is not None:
            trace |= {"name": _label(names[spec["s"]]), "showlegend": len(names) > 1 and "hovertemplate" in spec}
        made.append(trace)
    layout = _painted(view["layout"], colours) | _look(title, colours)
    return go.Figure(data=made, layout=layout | {"height": figure["height"] + 90 if figure else None})


def _heat_map(figure: Map, title: str, dark: bool) -> PlotlyFigure:
    go, colours = import_plotly(), DARK if dark else LIGHT
    top, rows = figure["top"], [_label(row) for row in figure["rows"]]
    even = [[0, "share-low"], [1 / top, "share-even"], [(1 + (top - 1) * 0.45) / top, "share-high"], [1, "share-top"]]
    scale = [[at, colours[name]] for at, name in even]

    def drawn(view: dict[str, Any]) -> Any:
        columns = view.get("columns") or figure.get("columns") or list(range(len(view["z"][0])))
        told = [[[row, _label(str(column))] for column in columns] for row in rows]
        return go.Heatmap(
            z=view["z"], zmin=0, zmax=top, colorscale=scale, customdata=told, xgap=1, ygap=1,
            hovertemplate=f"{figure['row']} %{{customdata[0]}}, {figure['cell']} %{{customdata[1]}}"
                          f"<br>%{{z:.2f}}{figure['unit']}<extra></extra>",
        )  # fmt: skip

    views = figure["views"]
    layout = _look(title, colours) | {
        "xaxis": {"title": {"text": figure["column"]}, "showgrid": False, "showticklabels": "columns" not in views[-1]},
        "yaxis": {"tickvals": list(range(len(rows))), "ticktext": rows, "autorange": "reversed", "showgrid": False,
                  "title": {"text": figure["row"]}},
        "height": 190 + min(24 * max(4, len(rows)), 640),
    }  # fmt: skip
    if borders := figure.get("borders"):
        line = {"color": colours["ink"], "width": 1.5}
        layout["shapes"] = [{"type": "line", "x0": at - 0.5, "x1": at - 0.5, "y0": 0, "y1": 1, "yref": "paper",
                             "line": line} for at in borders]  # fmt: skip
    if columns := figure.get("columns"):
        every = max(1, len(columns) // 10)
        layout["xaxis"] |= {"tickvals": list(range(0, len(columns), every)), "ticktext": columns[::every]}
    if len(views) > 1:
        stay = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
        steps = [{"label": view["label"], "method": "animate", "args": [[view["label"]], stay]} for view in views]
        layout["sliders"] = [{"active": len(views) - 1, "steps": steps, "currentvalue": {"prefix": ""}}]
    frames = [go.Frame(name=view["label"], data=[drawn(view)]) for view in views]
    return go.Figure(data=[drawn(views[-1])], layout=layout, frames=frames)


def _label(text: str) -> str:
    """Escapes the HTML that Plotly would interpret in names."""
    return clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _look(title: str, colours: dict[str, str]) -> dict[str, Any]:
    return {"title": {"text": _label(title)}, "paper_bgcolor": colours["paper"], "plot_bgcolor": colours["paper"],
            "font": {"color": colours["ink"]}}  # fmt: skip
