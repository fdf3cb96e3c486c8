"""A RUN on the command line: a run, a comparison, a record file, or something that is none of them."""

from __future__ import annotations

import json

import pytest

from equipoise.errors import DataError
from equipoise.records import RECORD_NAME
from equipoise.report import load_runs
from report.synthetic import header, write_run


@pytest.fixture
def two(tmp_path):
    write_run(tmp_path / "b" / "seed0", header("micro", 0, steps=5, started="2026-01-01T00:00:02Z"))
    write_run(tmp_path / "a", header("global", 0, steps=5, started="2026-01-01T00:00:01Z"))
    return tmp_path


def names(runs):
    return [run.header.strategy for run in runs]


def test_a_run_a_file_and_a_comparison(two):
    assert names(load_runs([two / "a"])[0]) == ["global"]
    assert names(load_runs([two / "a" / RECORD_NAME])[0]) == ["global"]
    assert names(load_runs([two])[0]) == ["global", "micro"]  # as they were started
    assert names(load_runs([two / "b" / "seed0", two])[0]) == ["micro", "global"]  # none twice


@pytest.mark.parametrize(
    "text",
    [
        '{"strategies": ["micro", "global"]}',
        '{"config": {"strategies": ["micro", "global"]}}',
        '{"strategies": [{"name": "micro"}, {"name": "global"}]}',
    ],
)
def test_a_comparison_knows_its_order(two, text):
    (two / "comparison.json").write_text(text)
    assert names(load_runs([two])[0]) == ["micro", "global"]


@pytest.mark.parametrize("text", ["", "[1]", '{"config": 3}', '{"strategies": 7}'])
def test_a_broken_comparison_file_costs_the_order_only(two, text):
    (two / "comparison.json").write_text(text)
    assert names(load_runs([two])[0]) == ["global", "micro"]


def test_a_broken_run_in_a_comparison_costs_that_run_only(two):
    (two / "c").mkdir()
    (two / "c" / RECORD_NAME).write_text(json.dumps({"kind": "header", "schema": 99}) + "\n")
    runs, problems = load_runs([two])
    assert names(runs) == ["global", "micro"]
    assert problems == ["c: left out, schema 99"]
    with pytest.raises(DataError, match="schema 99"):
        load_runs([two / "c"])


def test_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a run in"):
        load_runs([tmp_path])
    with pytest.raises(DataError, match="a run record at"):
        load_runs([tmp_path / "absent"])
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD_NAME).write_text("")
    with pytest.raises(DataError, match="a readable run"):
        load_runs([tmp_path])
