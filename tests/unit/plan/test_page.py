"""The page of a plan: its figures hold the forecast's numbers, it loads nothing, and no name becomes markup."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from equipoise.errors import OutputError
from equipoise.plan import Cluster, Skew, Strategy, forecast, render_forecast, render_page, typical, write_page
from equipoise.plan.straggler import slowest
from unit.report._browser import opened
from unit.report._parsed import HOSTILE, Page

C = Cluster(gpus=32, ep=16, experts=32, layers=3, micro_batches=2)


@pytest.fixture(scope="module")
def plan():
    return forecast(C, typical(), up_to=64, notes=["a note"])


@pytest.fixture(scope="module")
def text(plan):
    return render_page(plan, typical())


@pytest.fixture(scope="module")
def page(text):
    return Page(text)


def view(page, figure, label):
    return next(one for one in page.data["figures"][f"plot-{figure}"]["views"] if one["label"].startswith(label))


def short(values):
    return [float(f"{value:.4g}") for value in values]


def test_the_headline_the_notes_and_the_assumptions_are_those_of_the_text(plan, page):
    told = " ".join(render_forecast(plan).replace("−", "-").split())
    words = page.words.replace("−", "-")
    assert told[: told.index(".")] in words and "a note" in words
    for sentence in ("32 GPUs of 989 TFLOP/s", "every layer waits for the slowest rank", "typical loads"):
        assert sentence in told and sentence in words


def test_bars_add_up_to_the_step(plan, page):
    data = view(page, "time", "Seconds")["data"]
    assert data[0]["y"] == ["even load", *(one.name for one in plan.rows)]
    sums = [sum(bar["x"][i] for bar in data) for i in range(1 + len(plan.rows))]
    assert sums == pytest.approx([plan.even.total, *(one.time.total for one in plan.rows)], rel=2e-4)
    beyond = view(page, "beyond", "Step time")["data"]
    sums = [sum(bar["x"][i] for bar in beyond) for i in range(len(plan.rows))]
    assert sums == pytest.approx([100 * one.cost for one in plan.rows], rel=1e-3)


def test_waits_are_the_draws_of_the_simulation(page):
    for index, one in enumerate(typical()):
        factors = slowest(one.loads, C).ravel()
        often = view(page, "waits", "How often")["data"][index]
        assert sum(often["y"]) == pytest.approx(100, abs=0.1)
        mean = np.average(often["x"], weights=often["y"])
        assert mean == pytest.approx(factors.mean(), abs=often["x"][1] - often["x"][0])
        at_least = view(page, "waits", "At least")["data"][index]
        for x, share in list(zip(at_least["x"], at_least["y"], strict=True))[::10]:
            assert share == pytest.approx(100 * np.mean(factors >= x), abs=3)


def test_growth_is_that_of_the_table(plan, page):
    for label, read in (
        ("Slowest", lambda one: one.straggler.mean),
        ("Seconds", lambda one: one.time.total),
        ("Step time", lambda one: 100 * one.cost),
    ):
        for index, line in enumerate(view(page, "growth", label)["data"]):
            assert line["x"] == [one.ep for one in plan.growth]
            assert line["y"] == short(read(one.rows[index]) for one in plan.growth)


def test_every_figure_is_one_that_plotly_knows(page):
    graph_objects = pytest.importorskip("plotly.graph_objects")
    for figure in page.data["figures"].values():
        for one in figure["views"]:
            data = json.loads(re.sub(r'"@[a-z0-9/.-]+"', '"#123456"', json.dumps(one["data"])))
            for trace in data:
                trace.pop("s", None)
            graph_objects.Figure(data=data, layout=one["layout"])


def test_nothing_is_loaded_from_anywhere(text, page):
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object"}
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert len(text.encode()) < 2.5e6


def test_without_growth_there_is_no_section_of_it_and_one_strategy_needs_no_chips():
    only = [Strategy("ours", Skew(0.1, 0.5))]
    page = Page(render_page(forecast(C, only, up_to=0), only))
    assert "How it grows" not in page.words and "Against micro" not in page.words
    assert not [attrs for tag, attrs in page.tags if attrs.get("class") == "chip"]


def test_hostile_and_equal_names_stay_text_and_apart():
    def made(more):
        strategies = [Strategy(f"{more}{'x' * (i // 2)}", Skew(0.1 * i, 0.3), origin=more) for i in range(4)]
        return Page(render_page(forecast(C, strategies, up_to=4, notes=[more]), strategies))

    harmless = made("ours").skeleton
    for hostile in HOSTILE:
        page = made(hostile)
        assert page.skeleton == harmless
        names = view(page, "time", "Seconds")["data"][0]["y"]
        assert len(set(names)) == 5 and not any("<" in name for name in names)


def test_the_file_appears_whole_or_not_at_all(plan, text, tmp_path):
    assert write_page(plan, typical(), tmp_path / "new" / "plan.html").read_text(encoding="utf-8") == text
    with pytest.raises(OutputError, match="to write"):
        write_page(plan, typical(), "/proc/none/plan.html")


@pytest.mark.parametrize(("wide", "scheme"), [(1200, "light"), (390, "dark")])
def test_a_browser_draws_it_and_it_fits_a_phone(browser, plan, tmp_path, wide, scheme):
    path = write_page(plan, typical(), tmp_path / "plan.html")
    with opened(browser, path, wide=wide, scheme=scheme, has_touch=wide < 500) as page:
        assert page.locator(".plot:not(:has(svg))").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == wide
        names = page.locator("#plot-time .ytick text").all_text_contents()
        assert sorted(names) == sorted(["even load", *(one.name for one in plan.rows)])  # none is left out
