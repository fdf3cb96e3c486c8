"""A RUN on the command line: a run, a comparison, a record file, or something that is none of them."""

from __future__ import annotations

import json

import pytest

from equipoise.errors import DataError
from equipoise.report.data.load import load, load_runs
from equipoise.storage.inspection_record import write_inspection
from equipoise.storage.run_record import RECORD_NAME
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_inspection


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
    assert names(load_runs([two / "c", two / "a"])[0]) == ["global"]  # one that was named costs itself only, too
    with pytest.raises(DataError, match="schema 99"):
        load_runs([two / "c"])


def test_nothing_readable_is_an_error(tmp_path):
    with pytest.raises(DataError, match="a run or an inspection in"):
        load_runs([tmp_path])
    with pytest.raises(DataError, match="a run record at"):
        load_runs([tmp_path / "absent"])
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / RECORD_NAME).write_text("")
    with pytest.raises(DataError, match="something readable"):
        load_runs([tmp_path])


def test_inspections_and_runs_in_any_mixture(two):
    write_inspection(two / "look" / "one", synthetic_inspection(model="models/one"))
    write_inspection(two / "a", synthetic_inspection(model="models/a"))  # beside the record of the run itself
    runs, inspections, problems = load([two])
    assert names(runs) == ["global", "micro"]
    assert sorted(one.facts.model for one in inspections) == ["models/a", "models/one"]
    assert problems == []
    _, (only,), _ = load([two / "look" / "one" / "inspection.json"])
    assert only.facts.model == "models/one"
    with pytest.raises(DataError, match="inspections only"):
        load_runs([two / "look" / "one"])


def test_a_damaged_or_stopped_inspection_costs_itself_only(two):
    for name in ("damaged", "stopped"):
        write_inspection(two / name, synthetic_inspection())
    (two / "damaged" / "arrays.npz").write_bytes(b"half")
    (two / "stopped" / "inspection.json").unlink()
    (two / "stopped" / "state").mkdir()
    runs, inspections, problems = load([two / "a", two / "damaged", two / "stopped"])
    assert (names(runs), inspections) == (["global"], [])
    assert "damaged: left out, arrays.npz does not have the checksum" in problems[0]
    assert problems[1] == "stopped: left out, one that is not finished"
    with pytest.raises(DataError, match="goes on with it"):
        load([two / "stopped"])
