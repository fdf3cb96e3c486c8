"""``equipoise.plot``: the figures of a notebook hold the numbers of the records, and say plainly what is missing."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from equipoise import plot
from equipoise.errors import ConfigError, DataError
from equipoise.report import load_runs
from equipoise.report.export.notebook import DARK, LIGHT
from equipoise.storage.inspection_record import write_inspection
from equipoise.storage.run_record import read_run
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_inspection


def test_curves_hold_the_mean_and_the_extremes_of_the_seeds(folder):
    figure = plot.curves(folder, "balance/maxvio_global")
    assert [trace.name for trace in figure.data if trace.showlegend] == ["micro", "global", "global+micro", "loss-free"]
    assert figure.layout.title.text == "MaxVio, global batch"
    line = next(trace for trace in figure.data if trace.name == "global" and trace.line.width == 2)
    seeds = [read_run(folder / f"global-s{seed}") for seed in (0, 1)]
    per_step = np.array([[step.balance["balance/maxvio_global"] for step in run.steps] for run in seeds])
    assert line.y[0] == pytest.approx(per_step[:, :2].mean(), rel=1e-3)  # a point is a mean of two steps here
    band = next(trace for trace in figure.data if trace.name == "global" and trace.line.width == 0)
    both = per_step[:, :2].mean(axis=1)
    assert (band.y[0], band.y[-1]) == pytest.approx((both.max(), both.min()), rel=1e-3)
    assert figure.data[-1].text[-1] == "uniform random routing"
    perplexity = plot.curves(load_runs([folder])[0])
    assert perplexity.data[-1].x[-1] == 150
    assert plot.maxvio(folder).data[-2].y == figure.data[-2].y


def test_loads_have_a_frame_for_every_stored_step(folder):
    run = read_run(folder / "global-s0")
    figure = plot.loads(folder, "global")
    assert [frame.name for frame in figure.frames] == [f"step {load.step}" for load in run.loads]
    for frame, load in zip(figure.frames, run.loads, strict=True):
        counts = np.array(load.counts)
        np.testing.assert_allclose(np.array(frame.data[0].z), counts / counts.mean(-1, keepdims=True), atol=0.006)
    assert len(figure.layout.sliders[0].steps) == len(run.loads)
    over_time = plot.load_over_time(folder, layer=2, strategy="global")
    cells = np.array(over_time.data[0].z)
    assert cells.shape == (16, len(run.loads))
    last = np.array(run.loads[-1].counts[2])
    np.testing.assert_allclose(cells[:, -1], last / last.mean(), atol=0.006)


def test_domains_of_a_run_and_of_an_inspection(folder, tmp_path):
    one = synthetic_inspection(model="models/olmoe")
    write_inspection(tmp_path / "look", one)
    for figure in (plot.domains(tmp_path / "look"), plot.domains(one), plot.domains([one, folder / "none"][:1])):
        trace = figure.frames[1].data[0]
        wanted = one.frequency_DLE()[:, 1] * 16 / 2
        for row in range(3):
            for at, told in enumerate(trace.customdata[row]):
                assert trace.z[row][at] == pytest.approx(wanted[row, int(told[1])], abs=0.006)
    run = read_run(folder / "global-s0")
    trace = plot.domains(folder, "global").frames[0].data[0]
    counts = np.array(run.evaluations[-1].counts[0][0])
    assert trace.z[0][0] == pytest.approx(counts[int(trace.customdata[0][0][1])] / counts.mean(), abs=0.006)


def test_names_are_text_for_plotly(tmp_path):
    evil = "<b>&<script>"
    write_run(tmp_path / "a", header(evil, 0, steps=20, domains=[evil, "x", "y", "z", "v", "w"]))
    write_run(tmp_path / "b", header("micro", 0, steps=20, domains=[evil, "x", "y", "z", "v", "w"]))
    figure = plot.domains(tmp_path, evil)
    assert figure.layout.yaxis.ticktext[0] == "&lt;b&gt;&amp;&lt;script&gt;"
    assert "<" not in figure.layout.title.text
    assert all("<" not in (trace.name or "") for trace in plot.curves(tmp_path).data)


def test_what_cannot_be_drawn_is_said(folder, tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'balance/maxvio_global'"):
        plot.curves(folder, "balance/maxvio_globl")
    with pytest.raises(ConfigError, match="scope of MaxVio"):
        plot.maxvio(folder, "batch")
    with pytest.raises(ConfigError, match="a layer from 0 to 2"):
        plot.load_over_time(folder, layer=3)
    with pytest.raises(ConfigError, match="strategy of these runs"):
        plot.loads(folder, "globl")
    with pytest.raises(DataError, match="inspections only"):
        plot.curves(synthetic_inspection())
    run = read_run(write_run(tmp_path / "run", header("micro", 0, steps=5)))
    with pytest.raises(DataError, match="stored loads of micro"):
        plot.load_over_time(replace(run, loads=[]))


def test_without_plotly_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(ConfigError, match="equipoise\\[report\\]"):
        plot.curves(folder)


@pytest.mark.parametrize(("colours", "part"), [(LIGHT, 0), (DARK, 1)])
def test_the_colours_are_those_of_the_page(colours, part):
    style = (resources.files("equipoise.report.html") / "assets" / "base.css").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.S)
    there = dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", blocks[part]))
    assert {name: there[name] for name in colours} == colours
