"""The curves as Plotly specifications: what is drawn, over which window, beside which floor."""

from __future__ import annotations

import math
from dataclasses import replace

from equipoise.report import load_runs, summarize
from equipoise.report.data.curves import Charts, Curve
from equipoise.report.html.figures import (
    OF_LAYERS,
    OF_PAIRS,
    OF_SEEDS,
    by_layer,
    domain_load_curves,
    estimator_curves,
    group_curves,
    layer_curves,
    over_checkpoints,
    perplexity_curves,
    training_curves,
)
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
    charts = Charts(by_layer={"topk_score": Curve([1, 2], [0.5, 0.7])})
    figure = layer_curves(replace(comparison, strategies=[replace(comparison.strategies[0], charts=charts)]))
    assert figure is not None
    (view,) = figure["views"]
    assert (view["label"], view["data"][0]["x"], view["data"][0]["y"]) == ("Top-K score", [1, 2], [0.5, 0.7])
    assert by_layer([("x", [("m", 0, [math.nan], [], "chance")])]) is None


def bands(view):
    return [trace for trace in view["data"] if trace.get("fill") == "toself"]


def test_where_there_are_seeds_every_line_has_its_band_and_the_view_says_what_it_is(comparison, folder):
    figures = [draw(comparison) for draw in (perplexity_curves, training_curves, layer_curves, estimator_curves,
                                             domain_load_curves)]  # fmt: skip
    for figure in figures:
        for view in figure["views"]:
            lines = [trace for trace in view["data"] if "hovertemplate" in trace]
            assert len(bands(view)) == len(lines) > 0
            assert [one["legendgroup"] for one in bands(view)] == [one["legendgroup"] for one in lines]
            assert view["note"] == (OF_PAIRS if view["label"].startswith("Difference") else OF_SEEDS)
            for line, band in zip(lines, bands(view), strict=True):
                high, low = band["y"][: len(line["y"])], band["y"][len(line["y"]) :][::-1]
                assert all(a <= b <= c for a, b, c in zip(low, line["y"], high, strict=True))
    alone = summarize(load_runs([folder / "micro-s0", folder / "global-s0"])[0])
    for figure in (perplexity_curves(alone), training_curves(alone), layer_curves(alone)):
        assert not [view for view in figure["views"] if bands(view) or "note" in view]


def test_groups_of_one_strategy_are_drawn_for_all(tmp_path):
    for number, policy in enumerate(("AuxLoss(scope='micro_batch', groups=4)", "AuxLoss(scope='micro_batch')")):
        write_run(tmp_path / str(number), header(f"s{number}", 0, steps=20, policies=[policy]))
    figure = group_curves(summarize(load_runs([tmp_path])[0]))
    (view,) = figure["views"]
    assert view["label"] == "MaxVio over 4 groups of 4 experts"
    assert [trace["s"] for trace in view["data"]] == [0, 1]


def test_without_groups_there_is_no_chart_of_them(comparison):
    assert group_curves(comparison) is None


def test_checkpoints_are_lines_over_steps_with_chance_beside_them():
    curve, floor = Curve([20, 300], [1.0, 2.0], [0.5, 1.5], [1.5, 2.5]), Curve([20, 300], [0.1, 0.1])
    view = over_checkpoints([("MaxVio", [("a<b>", 3, curve, floor, "uniform routing")]), ("none", [])])["views"][0]
    band, line, chance = view["data"]
    assert (line["name"], line["x"], line["line"]["color"], line["s"]) == ("a&lt;b&gt;", [20, 300], "@s3", None)
    assert (band["x"], band["y"]) == ([20, 300, 300, 20], [1.5, 2.5, 1.5, 0.5])
    assert band["fillcolor"] == "@s3/0.16" and chance["name"] == "uniform routing"
    assert view["note"] == OF_LAYERS
    assert over_checkpoints([("x", [("a", 0, None, None, "")])]) is None
