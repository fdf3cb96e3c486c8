"""A report as a whole: what is read, summarized and written, of runs and inspections alike."""

from __future__ import annotations

import json

import pytest

from equipoise.errors import ConfigError
from equipoise.report import summarize
from equipoise.report.export.outputs import read_report, write_outputs
from equipoise.storage.inspection_record import write_inspection
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_inspection


@pytest.fixture
def paths(tmp_path):
    run = write_run(tmp_path / "run", header("micro", 0, steps=20))
    write_inspection(tmp_path / "look", synthetic_inspection(model="models/olmoe", domains=2, experts=4))
    return [run, tmp_path / "look"]


def test_text_json_and_page_hold_runs_and_inspections(paths):
    report = read_report(paths)
    assert report.comparison == summarize(report.runs)
    for text in (report.text(), report.html()):
        assert "micro reaches perplexity" in text and "olmoe" in text
    data = json.loads(report.json())
    assert [one["name"] for one in data["strategies"]] == ["micro"]
    assert [one["name"] for one in data["inspections"]] == ["olmoe"]
    assert 'data-seconds="7"' in report.html(live=7)


def test_problems_are_told_with_and_without_runs(paths, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "record.jsonl").write_text('{"kind": "header", "schema": 99}\n')
    for chosen in (paths[:1], paths[1:], paths):
        report = read_report([*chosen, tmp_path / "broken"])
        assert report.text().count("! broken: left out, schema 99") == 1
        assert "broken: left out, schema 99" in report.json() and "broken: left out, schema 99" in report.html()


def test_a_baseline_needs_runs(paths):
    assert read_report(paths, "micro").comparison is not None
    with pytest.raises(ConfigError, match="did you mean 'micro'"):
        read_report(paths, "mikro")
    with pytest.raises(ConfigError, match="inspections only"):
        read_report(paths[1:], "micro")


def test_only_what_is_named_is_written(paths, tmp_path):
    report = read_report(paths)
    before = set(tmp_path.rglob("*"))
    assert write_outputs(report) == []
    assert set(tmp_path.rglob("*")) == before
    lines = write_outputs(report, out=str(tmp_path / "x" / "page.html"), csv=str(tmp_path / "one.csv"))
    assert lines == [f"Report: {tmp_path / 'x' / 'page.html'}", f"Numbers: {tmp_path / 'one.csv'}"]
    assert (tmp_path / "x" / "page.html").read_text() == report.html()
