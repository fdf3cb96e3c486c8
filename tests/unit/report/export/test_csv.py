"""CSV: every kind of number in a file of its own, and no cell that a spreadsheet would run."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest

from equipoise.errors import ConfigError
from equipoise.report import load_runs
from equipoise.report.data.inspections import name_inspections
from equipoise.report.export.csv import write_csv


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_folder_has_a_file_of_each_kind(comparison, folder, inspections, tmp_path):
    runs = load_runs([folder])[0]
    made = write_csv(tmp_path / "all", comparison, runs, name_inspections(inspections))
    assert [path.stem for path in made] == [
        "numbers",
        "steps",
        "evaluations",
        "loads",
        "inspected_layers",
        "inspected_domains",
    ]
    numbers = {(row["strategy"], row["measure"]): row for row in rows(made[0])}
    one = numbers["global", "perplexity"]
    assert float(one["mean"]) == comparison["global"].values["perplexity"].mean
    assert float(one["difference"]) == comparison["global"].differences["perplexity"].mean
    assert numbers["micro", "perplexity"]["difference"] == ""
    assert (
        float(numbers["micro", "train_maxvio_global"]["uniform_random"])
        == comparison.noise_floor["train_maxvio_global"]
    )
    assert len(rows(made[1])) == sum(len(run.steps) for run in runs)
    layers = rows(made[4])
    assert float(layers[0]["MaxVio, all text"]) == inspections[0].layers[0].maxvio_global
    assert layers[-1]["Saturation"] == ""  # the second model had nothing to be compared with


def test_one_file_has_the_first_kind(comparison, inspections, tmp_path):
    assert write_csv(tmp_path / "a.csv", comparison, [], []) == [tmp_path / "a.csv"]
    assert rows(tmp_path / "a.csv")[0]["measure"] == "perplexity"
    write_csv(tmp_path / "b.csv", None, [], name_inspections(inspections))
    assert rows(tmp_path / "b.csv")[0]["model"] == "sharp"
    (tmp_path / "c.csv").mkdir()
    with pytest.raises(ConfigError, match="a folder"):
        write_csv(tmp_path / "c.csv", comparison, [], [])


@pytest.mark.parametrize("name", ["=1+1", "+1", "-1", "@x", "\tx"])
def test_no_name_is_a_formula(comparison, tmp_path, name):
    found = replace(comparison, strategies=[replace(comparison.strategies[0], name=name)])
    write_csv(tmp_path / "a.csv", found, [], [])
    assert {row["strategy"] for row in rows(tmp_path / "a.csv")} == {f"'{name}"}
