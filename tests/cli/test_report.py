"""``equipoise report`` as a user types it."""

from __future__ import annotations

import json

import pytest

from equipoise.cli import main
from report.synthetic import write_comparison


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_comparison(tmp_path_factory.mktemp("runs"), seeds=1, strategies=("micro", "global"), steps=50)


def test_prints_a_table_and_writes_a_page(folder, tmp_path, capsys):
    assert main(["report", str(folder), "--out", str(tmp_path / "page.html")]) == 0
    text = capsys.readouterr().out
    assert "where micro has" in text
    assert str(tmp_path / "page.html") in text
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")


def test_json_is_json_and_nothing_else(folder, capsys):
    assert main(["report", str(folder / "micro-s0"), str(folder / "global-s0" / "record.jsonl"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in data["strategies"]] == ["micro", "global"]


def test_baseline_may_be_chosen(folder, capsys):
    assert main(["report", str(folder), "--baseline", "global", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["baseline"] == "global"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["nowhere"], 4), (["{folder}", "--baseline", "globl"], 2), (["{folder}", "--out", "/proc/none/x.html"], 5)],
)
def test_errors_have_their_exit_codes(folder, arguments, code, capsys):
    assert main(["report", *(one.format(folder=folder) for one in arguments)]) == code
    assert "expected" in capsys.readouterr().err
