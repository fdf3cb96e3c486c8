"""The curves as Plotly specifications: what is drawn, over which window, beside which floor."""

from __future__ import annotations

import math
from dataclasses import replace

from equipoise.report import summarize
from equipoise.report.html.figures import by_layer, layer_curves, perplexity_curves, training_curves
from equipoise.storage.run_record import read_run
from unit.report.synthetic import header, write_run


def test_a_single_evaluation_is_seen(tmp_path):
    """A line through one point has no length."""
    run = read_run(write_run(tmp_path, header("micro", 0, steps=20)))
    run = replace(run, evaluations=run.evaluations[-1:])
    (trace,) = perplexity_curves(summarize([run]))["views"][0]["data"]
    assert (len(trace["x"]), trace["mode"]) == (1, "lines+markers")


def test_a_view_per_domain_and_one_of_differences(comparison):
    figure = perplexity_curves(comparison)
    assert figure is not None
    labels = [view["label"] for view in figure["views"]]
    assert labels == ["Mean of all domains", "Difference from micro, %", *comparison.domains]
    lines = [trace for trace in figure["views"][0]["data"] if "hovertemplate" in trace]
    assert [trace["s"] for trace in lines] == [0, 1, 2, 3]
    low, high = (10**bound for bound in figure["views"][0]["layout"]["yaxis"]["range"])
    ends = [trace["y"][-1] for trace in lines]
    assert low < min(ends) and max(ends) < high < lines[0]["y"][0]  # the steep start is cut off


def test_maxvio_comes_first_and_with_its_floor(comparison):
    figure = training_curves(comparison)
    assert figure is not None
    view = figure["views"][0]
    assert view["label"] == "MaxVio, global batch"
    floor = comparison.noise_floor["train_maxvio_global"]
    assert view["data"][-1]["y"] == [float(f"{floor:.4g}")] * 2


def test_layers_without_a_number_are_not_drawn(comparison):
    only = replace(
        comparison, strategies=[replace(comparison.strategies[0], layers={"topk_score": [math.nan, 0.5, 0.7]})]
    )
    figure = layer_curves(only)
    assert figure is not None
    (view,) = figure["views"]
    assert (view["label"], view["data"][0]["y"]) == ("Top-K score", [None, 0.5, 0.7])
    assert by_layer([("x", [("m", 0, [math.nan], [], "chance")])]) is None
