"""Curves as plain Plotly specifications, with names of colours ("@s0") that the page replaces, light or dark.

A figure has views, of which a menu shows one; ``s`` of a trace is the index of its strategy.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from ..data.comparison import Comparison
from ..data.curves import Curve
from ..data.formatting import clean, clip

__all__ = [
    "FLOORS",
    "NAMES",
    "Figure",
    "by_layer",
    "domain_load_curves",
    "estimator_curves",
    "group_curves",
    "layer_curves",
    "metric_name",
    "over_checkpoints",
    "perplexity_curves",
    "training_curves",
]

Figure = dict[str, Any]  # {"views": [{"label", "data", "layout", "note"?}], "height": px}

NAMES = {
    "balance/maxvio_global": "MaxVio, global batch",
    "balance/maxvio_micro_batch": "MaxVio, micro-batch",
    "balance/maxvio_sequence": "MaxVio, sequence",
    "loss": "Training loss, nats per token",
    "grad_norm": "Gradient norm",
    "lr": "Learning rate",
    "tokens_per_second": "Tokens per second",
}
FLOORS = {f"balance/maxvio_{scope}": f"train_maxvio_{scope}" for scope in ("global", "micro_batch", "sequence")}
LOG_TICKS = [m * 10**e for e in range(-3, 4) for m in (1, 2, 5)]
BY_LAYER = {
    "mutual_information": "Domain information, nats",
    "topk_score": "Top-K score",
    "maxvio_global": "MaxVio, all held-out text",
    "dead_experts": "Dead experts",
    "routing_churn": "Routing churn since the evaluation before",
}
HEAD = 0.35  # fraction of a run whose loss is so high that it would flatten the rest
OF_SEEDS = "Line: mean over the seeds. Band: from the lowest seed to the highest."
OF_PAIRS = "Line: mean over pairs of runs with the same seed. Band: its 95% interval."
OF_LAYERS = "Line: mean over the layers. Band: from the lowest layer to the highest."


def metric_name(name: str) -> str:
    """What a figure calls a metric of the trainer or the balancer.

    >>> metric_name("grad_norm"), metric_name("balance/global_image/maxvio"), metric_name("balance/cv_global")
    ('Gradient norm', 'MaxVio as global_image sees it', 'balance/cv_global')
    """
    if of_policy := re.fullmatch(r"balance/(.+)/maxvio", name):  # over its groups, targets, or class of tokens
        return f"MaxVio as {clean(of_policy[1])} sees it"
    return NAMES.get(name, clean(name))


def perplexity_curves(comparison: Comparison) -> Figure | None:
    """Held-out perplexity at each evaluation: mean over domains, difference from the baseline, single domains."""
    charts = [one.charts for one in comparison.strategies]
    choices: list[tuple[str, list[Curve | None]]] = [("Mean of all domains", [one.perplexity for one in charts])]
    choices += [(name, [one.domain_perplexity.get(name) for one in charts]) for name in comparison.domains]
    views = [
        _view(label, curves, _over_steps(_without_head(curves), "log", _end(curves)))
        for label, curves in choices
        if any(curves)
    ]
    differences = [one.difference for one in charts]
    if any(differences):
        layout = _over_steps(_around_zero(differences), "linear", _end(differences))
        views.insert(1, _view(f"Difference from {comparison.baseline}, %", differences, layout, note=OF_PAIRS))
    return {"views": views, "height": 330} if views else None


def training_curves(comparison: Comparison) -> Figure | None:
    """Metrics of every step, one view each: MaxVio with its noise floor first."""
    measured = {name for one in comparison.strategies for name in one.charts.training}
    names = [name for name in NAMES if name in measured] + sorted(measured - set(NAMES))
    views = []
    for name in names:
        curves = [one.charts.training.get(name) for one in comparison.strategies]
        positive = all(curve is None or min(curve.mean, default=1) > 0 for curve in curves)
        scale = "log" if positive and ("maxvio" in name or name == "grad_norm") else "linear"
        layout = _over_steps(None, scale, _end(curves))
        if name == "loss":
            layout = _over_steps(_without_head(curves), "linear", _end(curves))
        view = _view(metric_name(name), curves, layout)
        if (floor := comparison.noise_floor.get(FLOORS.get(name, ""))) and positive:
            view["data"].append(_floor(_end(curves), floor))
        views.append(view)
    return {"views": views, "height": 330} if views else None


def layer_curves(comparison: Comparison) -> Figure | None:
    """Held-out numbers by layer."""
    views = []
    for key, label in BY_LAYER.items():
        curves = [one.charts.by_layer.get(key) for one in comparison.strategies]
        if any(curves):
            layout = {"xaxis": _layer_axis(1 + _end(curves)), "yaxis": {"rangemode": "tozero"}}
            views.append(_view(label, curves, layout, mode="lines+markers"))
    return {"views": views, "height": 300} if views else None


def group_curves(comparison: Comparison) -> Figure | None:
    """MaxVio over groups of experts in the global batches of the run, a view for each grouping."""
    of_strategies = [{one.grouping: one.maxvio for one in each.charts.groups} for each in comparison.strategies]
    views = []
    for grouping in dict.fromkeys(grouping for found in of_strategies for grouping in found):
        curves = [found.get(grouping) for found in of_strategies]
        views.append(_view(f"MaxVio over {grouping.name}", curves, _from_zero(curves)))
    return {"views": views, "height": 300} if views else None


def domain_load_curves(comparison: Comparison) -> Figure | None:
    """MaxVio of each domain's own load at each evaluation, a view for each domain."""
    views = []
    for name in comparison.domains:
        curves = [one.charts.domain_maxvio.get(name) for one in comparison.strategies]
        if any(curves):
            views.append(_view(f"MaxVio in {name}", curves, _from_zero(curves)))
    return {"views": views, "height": 300} if views else None


def by_layer(choices: Sequence[tuple[str, Sequence[tuple[str, int, list[float], list[float], str]]]]) -> Figure | None:
    """Curves over layers of inspections.

    Args:
        choices: for each view its label and curves: (name, colour, values, noise floor, name of the floor).
    """
    views = []
    for label, curves in choices:
        data = []
        for name, colour, values, floor, chance in curves:
            shown = _named(name)
            if any(map(math.isfinite, values)):
                own = _line(list(range(len(values))), values, None, color=f"@s{colour}", mode="lines+markers")
                data.append(own | {"name": shown, "showlegend": len(curves) > 1})
            if any(map(math.isfinite, values)) and any(map(math.isfinite, floor)):
                line = _line(list(range(len(floor))), floor, None, color=f"@s{colour}")
                line["line"] |= {"dash": "dot", "width": 1.5}
                data.append(line | {"name": f"{shown}: {chance}" if len(curves) > 1 else chance, "showlegend": True})
        if data:
            axis = _layer_axis(max(len(trace["x"]) for trace in data))
            layout = {"xaxis": axis, "yaxis": {"rangemode": "tozero"}, "showlegend": True, "hovermode": "x unified"}
            views.append({"label": label, "data": data, "layout": layout})
    return {"views": views, "height": 330} if views else None


def over_checkpoints(
    choices: Sequence[tuple[str, Sequence[tuple[str, int, Curve | None, Curve | None, str]]]],
) -> Figure | None:
    """Curves of models over the training steps of their checkpoints.

    Args:
        choices: for each view its label and curves: (name, colour, values, noise floor, name of the floor).
    """
    views = []
    for label, models in choices:
        curves = [values for _, _, values, _, _ in models]
        if not any(curves):
            continue
        named = [(f"@s{colour}", name) for name, colour, *_ in models]
        layout = _from_zero(curves) | {"showlegend": True}
        view = _view(label, curves, layout, note=OF_LAYERS, mode="lines+markers", named=named)
        for name, colour, _, floor, chance in models:
            if floor is not None:
                line = _line(floor.steps, floor.mean, None, color=f"@s{colour}")
                line["line"] |= {"dash": "dot", "width": 1.5}
                shown = f"{_named(name)}: {chance}" if len(models) > 1 else chance
                view["data"].append(line | {"name": shown, "showlegend": True})
        views.append(view)
    return {"views": views, "height": 330} if views else None


def estimator_curves(comparison: Comparison) -> Figure | None:
    """Relative error of the gradient of each estimator over the run, a view per strategy."""
    names = sorted({name for one in comparison.strategies for name in one.charts.relative_error})
    views = []
    for one in comparison.strategies:
        used = {e.name for e in one.estimators if e.in_use}
        curves = [one.charts.relative_error.get(name) for name in names]
        named = [(f"@s{i + 1}", f"{name} (in use)" if name in used else name) for i, name in enumerate(names)]
        if any(curves):
            layout = _over_steps(None, "linear", _end(curves)) | {"showlegend": True}
            views.append(_view(one.name, curves, layout, mode="lines+markers", named=named))
    return {"views": views, "height": 330} if views else None


def _view(
    label: str, curves: Sequence[Curve | None], layout: dict[str, Any], *, note: str = OF_SEEDS, mode: str = "",
    named: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:  # fmt: skip
    """A view; ``note`` says what its lines and bands are, where there are bands."""
    view = {"label": clean(label), "data": _lines(curves, mode, named), "layout": layout}
    return view | ({"note": note} if any(curve and curve.low is not None for curve in curves) else {})


def _lines(
    curves: Sequence[Curve | None], mode: str = "", named: Sequence[tuple[str, str]] = ()
) -> list[dict[str, Any]]:
    """A line per curve over its band; ``named``: colours and names of curves that are not of strategies."""
    data = []
    for index, curve in enumerate(curves):
        if curve is not None and curve.low is not None and curve.high is not None:
            data.append({
                "type": "scatter", "mode": "lines", "line": {"width": 0}, "fill": "toself",
                "s": None if named else index, "fillcolor": f"{named[index][0] if named else f'@s{index}'}/0.16",
                "hoverinfo": "skip", "showlegend": False, "legendgroup": str(index),
                "x": curve.steps + curve.steps[::-1], "y": _short(curve.high + curve.low[::-1]),
            })  # fmt: skip
    for index, curve in enumerate(curves):
        if curve is None:
            continue
        own = mode or ("lines" if len(curve.steps) > 1 else "lines+markers")  # a line through one point is invisible
        color, strategy = (named[index][0], None) if named else ("", index)
        line = _line(curve.steps, curve.mean, strategy, color=color, mode=own)
        more = {"name": _named(named[index][1]), "showlegend": True} if named else {}
        data.append(line | {"legendgroup": str(index)} | more)
    return data


def _named(name: str) -> str:
    return escape(clip(clean(name), 24), quote=False)  # Plotly reads a little HTML


def _layer_axis(layers: int) -> dict[str, Any]:
    return {"title": {"text": "MoE layer"}, "range": [-0.3, layers - 0.7], "dtick": math.ceil(layers / 12)}


def _line(
    x: list[int], y: list[float], strategy: int | None, *, color: str = "", mode: str = "lines"
) -> dict[str, Any]:
    color = color or f"@s{strategy}"
    return {
        "type": "scatter", "mode": mode, "x": x, "y": _short(y), "s": strategy, "showlegend": False,
        "line": {"color": color, "width": 2}, "marker": {"size": 6, "color": color},
        "hovertemplate": "%{y:.4~g}",
    }  # fmt: skip


def _floor(end: int, value: float) -> dict[str, Any]:
    return {
        "type": "scatter", "mode": "lines+text", "x": [1, end], "y": _short([value, value]), "showlegend": False,
        "line": {"color": "@muted", "width": 1, "dash": "dot"}, "hoverinfo": "skip",
        "text": ["", "uniform random routing"], "textposition": "top left", "textfont": {"color": "@muted", "size": 11},
    }  # fmt: skip


def _over_steps(window: list[float] | None, scale: str, end: int = 0) -> dict[str, Any]:
    x: dict[str, Any] = {"title": {"text": "step"}}
    y: dict[str, Any] = {"type": scale}
    if end:
        x["range"] = [0, end * 1.02]
    ticks = LOG_TICKS if scale == "log" else []
    if window is not None:
        y["range"] = [math.log10(value) for value in window] if scale == "log" else window
        ticks = _round_ticks(*window)
    if ticks:
        y |= {"tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}
    return {"xaxis": x, "yaxis": y, "hovermode": "x unified"}


def _from_zero(curves: Sequence[Curve | None]) -> dict[str, Any]:
    layout = _over_steps(None, "linear", _end(curves))
    return layout | {"yaxis": layout["yaxis"] | {"rangemode": "tozero"}}


def _round_ticks(low: float, high: float) -> list[float]:
    """Four to ten multiples of 1, 2 or 5 times a power of ten.

    >>> _round_ticks(36.0, 51.0)
    [36, 38, 40, 42, 44, 46, 48, 50]
    """
    rough = (high - low) / 8
    power = 10 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [round(i * step, 9) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _without_head(curves: Sequence[Curve | None]) -> list[float] | None:
    """Range of the vertical axis without the steep start of the run."""
    end = _end(curves)
    late = [
        value
        for curve in curves
        if curve
        for bound in (curve.mean, curve.low or [], curve.high or [])
        for step, value in zip(curve.steps, bound, strict=False)
        if step >= HEAD * end and math.isfinite(value) and value > 0
    ]
    if len(late) < 2 or min(late) == max(late):
        return None
    return [min(late) * 0.97, max(late) * 1.03]


def _around_zero(curves: Sequence[Curve | None]) -> list[float] | None:
    """Range of the vertical axis with zero and the intervals of the later steps."""
    end = _end(curves)
    late = [
        value
        for curve in curves
        if curve
        for bound in (curve.low or [], curve.high or [])
        for step, value in zip(curve.steps, bound, strict=True)
        if step >= HEAD * end and math.isfinite(value)
    ]
    low, high = min([0.0, *late]), max([0.0, *late])
    return [low - 0.08 * (high - low), high + 0.08 * (high - low)] if low < high else None


def _end(curves: Sequence[Curve | None]) -> int:
    return max((curve.steps[-1] for curve in curves if curve), default=0)


def _short(values: Sequence[float]) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]
