"""The page as a file: it holds everything, loads nothing, believes no name, and appears whole or not at all."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace

import pytest
from plotly import graph_objects

from equipoise.errors import ConfigError, OutputError
from equipoise.report import Comparison, load_runs, summarize, write_html
from equipoise.report.html import page as html_page
from equipoise.report.html.page import render_html
from equipoise.storage.run_record import read_run
from unit.report._parsed import EVIL, HOSTILE, Page, renamed
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_checkpoints


@pytest.fixture(scope="module")
def text(comparison) -> str:
    return render_html(comparison)


@pytest.fixture(scope="module")
def page(text) -> Page:
    return Page(text)


def test_the_page_holds_the_numbers(page, comparison):
    words = " ".join(" ".join(page.text).split()).replace("−", "-")
    assert comparison.headline in words
    for one in comparison.strategies:
        assert f"{one.values['perplexity'].mean:.2f}" in words
        for policy in one.policies:
            assert policy in words
    for part in ("5f3a9c", "torch 2.13.0", "train.micro_batches", "What it means", "uniform random", "finished"):
        assert part in words
    assert all(domain in words for domain in comparison.domains)


def test_nothing_is_loaded_from_anywhere(text, page):
    for tag, attrs in page.tags:
        assert tag not in ("link", "img", "iframe", "object", "embed", "base")
        assert not {"src", "srcset", "action"} & attrs.keys()
        assert (attrs.get("href") or "#").startswith("#")  # a section of the page itself
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_inlined_once_and_the_file_is_small(text, page):
    assert page.unpacked("report-plotly").count("plotly.js v") == 1
    assert len(text.encode()) < 2.5e6


def test_the_same_comparison_gives_the_same_page(comparison, text):
    assert render_html(comparison) == text


def test_every_figure_is_one_that_plotly_knows(page):
    """Plotly itself checks each trace and layout, once the page's own names for colours are filled in."""
    figures = page.data["figures"]
    shown = [attrs["id"] for tag, attrs in page.tags if attrs.get("class") == "plot"]
    assert (
        sorted(shown)
        == sorted(figures)
        == [f"plot-{one}" for one in ("domain-loads", "estimators", "layers", "perplexity", "training")]
    )
    for figure in figures.values():
        for view in figure["views"]:
            data = []
            for trace in json.loads(re.sub(r'"@[a-z0-9/.-]+"', '"#123456"', json.dumps(view["data"]))):
                trace.pop("s", None)
                data.append(trace)
            graph_objects.Figure(data=data, layout=view["layout"])


def test_the_maps_hold_the_records_counts(page, folder):
    counts = read_run(folder / "global-s0").evaluations[-1].counts
    index = 1  # global is the second strategy
    view = page.data["maps"][f"map-domains-{index}"]["views"][2]
    assert view["label"] == "layer 2"
    for row, domain in enumerate(counts):
        even = sum(domain[2]) / 16
        assert view["z"][row] == pytest.approx([domain[2][expert] / even for expert in view["columns"]], abs=0.006)
    load = read_run(folder / "global-s0").loads[-1]
    views = page.data["maps"][f"map-loads-{index}"]["views"]
    assert [one["label"] for one in views] == page.data["menus"]["loads"]
    assert len(views) == 30  # every stored load of a short run is a stop of the slider
    last = views[-1]
    assert last["label"] == "step 150"
    even = sum(load.counts[0]) / 16
    assert last["z"][0] == pytest.approx([one / even for one in load.counts[0]], abs=0.006)


@pytest.fixture(scope="module")
def evil(tmp_path_factory) -> Comparison:
    folder = tmp_path_factory.mktemp("evil")
    domains = [EVIL, "</script>", "%{y}", "a\x00b", "\ud800", "\\u003c"]
    for number, name in enumerate(("micro", EVIL, "@s0", "-->", "{{7*7}}")):
        head = header(name, 0, steps=20, domains=domains, policies=[EVIL], corpus_sha256=EVIL, versions={EVIL: EVIL})
        head = replace(head, config={**head.config, EVIL: {EVIL: EVIL}})
        run = write_run(folder / str(number), head)
        with open(run / "record.jsonl", "a") as file:
            file.write(EVIL + "\n")
    return summarize(load_runs([folder])[0], problems=[EVIL])


def test_no_name_becomes_markup(evil):
    text = render_html(evil)
    page = Page(text)
    assert [tag for tag, _ in page.tags].count("script") == 3
    assert [tag for tag, _ in page.tags].count("title") == 1
    assert not any(tag == "img" for tag, _ in page.tags)
    assert "\u202e" not in text
    assert "\u2028" not in text
    assert "alert(1)" in " ".join(page.text)  # shown, as text
    for name in page.data["strategies"]:
        assert "<" not in name  # plotly reads a little HTML in labels
    for figure in page.data["figures"].values():
        for view in figure["views"]:
            assert "<" not in "".join(view["layout"]["yaxis"].get("ticktext", []))
            for trace in view["data"]:
                assert "<" not in trace.get("name", "")


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_page_of_hostile_texts_has_the_elements_of_one_of_harmless_ones(comparison, inspections, hostile):
    """Strategies, domains, policies, folders, settings, models, layers, sentences: every text that a record holds."""
    found = {}
    for more in (" x", hostile):
        keys = frozenset([*comparison.domains, *comparison.versions, *comparison.config])
        runs = renamed(comparison, more, keys)
        models = [replace(one, facts=replace(one.facts, biases="biases"), problems=["unread"]) for one in inspections]
        found[more] = Page(render_html(runs, renamed(models, more), problems=[more]))
    assert found[hostile].skeleton == found[" x"].skeleton
    shown = found[hostile].words
    assert shown.count("alert(1)" if "alert" in hostile else "7 * 7" if "7" in hostile else "&'</script>") > 100
    assert found[hostile].data["menus"].keys() == found[" x"].data["menus"].keys()


def test_the_largest_comparison_stays_under_8_megabytes(tmp_path):
    domains = [f"domain {i}" for i in range(13)]
    runs = []
    first = read_run(write_run(tmp_path, header("", 0, steps=150, layers=48, experts=128, domains=domains)))
    for seed in (0, 1):
        head, run = replace(first.header, seed=seed), first
        balance = {f"balance/metric_{i}": 0.123456 * i for i in range(80)}  # more than a page should hold
        steps = [replace(step, balance=step.balance | balance) for step in run.steps]
        run = replace(run, steps=steps, evaluations=run.evaluations[-2:], loads=run.loads[-9:])
        runs += [replace(run, header=replace(head, strategy=f"sequences:{number}")) for number in range(10)]
    comparison = summarize(runs)
    path = write_html(comparison, tmp_path / "report.html")
    assert 3e6 < path.stat().st_size < 8e6
    sizes = {"domains": 12, "layers": 48, "experts": 128, "top_k": 8, "passages": 2, "passage_length": 128}
    assert len(render_html(comparison, synthetic_checkpoints((1, 2, 3, 4), **sizes)).encode()) < 8e6


@pytest.mark.parametrize("end", ["", "failed", "interrupted"])
def test_a_run_without_evaluations_or_loads_has_a_page(tmp_path, end):
    run = read_run(write_run(tmp_path / "run", header("micro", 0, steps=20), until=0, end=end))
    run.evaluations.clear()
    Page(render_html(summarize([run])))


def test_the_file_appears_whole_with_ordinary_rights(comparison, text, tmp_path):
    path = write_html(comparison, tmp_path / "new" / "folder" / "report.html")
    assert path.read_text(encoding="utf-8") == text
    assert os.listdir(path.parent) == ["report.html"]
    other = tmp_path / "other"
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode
    path.write_text("old")
    write_html(comparison, path)
    assert path.read_text(encoding="utf-8") == text


def test_a_place_that_cannot_be_written_is_an_error_and_leaves_nothing(comparison, tmp_path):
    (tmp_path / "report.html").mkdir()
    with pytest.raises(OutputError, match="to write"):
        write_html(comparison, tmp_path / "report.html")
    assert os.listdir(tmp_path) == ["report.html"]
    with pytest.raises(OutputError, match="to write"):
        write_html(comparison, "/proc/none/report.html")


def test_a_full_disk_keeps_the_old_page(comparison, tmp_path):
    resource = pytest.importorskip("resource", reason="needs a limit on the size of files")
    path = tmp_path / "report.html"
    path.write_text("the page before")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        with pytest.raises(OutputError, match="to write"):
            write_html(comparison, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert os.listdir(tmp_path) == ["report.html"]
    assert path.read_text() == "the page before"


def test_without_plotly_the_error_says_what_to_install(comparison, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    html_page._plotly.cache_clear()
    with pytest.raises(ConfigError, match="equipoise\\[report\\]"):
        write_html(comparison, tmp_path / "report.html")
    assert os.listdir(tmp_path) == []
