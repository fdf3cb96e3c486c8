"""A number is added to the comparison in one place: the terminal, the page, the CSV and the JSON all have it."""

from __future__ import annotations

import csv
import io
from dataclasses import replace

import pytest

from equipoise.report import load_runs, render_terminal, summarize, to_json
from equipoise.report.data.comparison_columns import COMPARISON_COLUMNS, GROUPS, Column, TerminalColumn
from equipoise.report.data.run_view import view_run
from equipoise.report.export.csv import write_csv
from equipoise.report.html.page import render_html
from equipoise.storage.run_record import read_run
from unit.report.synthetic import header, write_run

USERS = ("report.data.summarize", "report.text.comparison", "report.html.tables", "report.export.csv")


def test_a_new_column_appears_everywhere(folder, tmp_path, monkeypatch):
    new = Column("steps_trained", "Steps trained", "Cost", "How many steps there are.", lambda one: len(one.steps),
                 terminal=TerminalColumn("trained", 0))  # fmt: skip
    for user in USERS:
        monkeypatch.setattr(f"equipoise.{user}.COMPARISON_COLUMNS", (*COMPARISON_COLUMNS, new))
    runs = load_runs([folder])[0]
    found = summarize(runs)
    assert to_json(found)["strategies"][0]["values"]["steps_trained"]["mean"] == 150
    cost = render_terminal(found).partition("\nCost\n")[2].splitlines()
    assert cost[1].split()[-2:] == ["trained", "runs"] and cost[2].split()[-3] == "150"
    assert "Steps trained" in render_html(found) and "How many steps there are." in render_html(found)
    (path,) = write_csv(tmp_path / "one.csv", found, runs, [])
    rows = [row for row in csv.DictReader(io.StringIO(path.read_text())) if row["measure"] == "steps_trained"]
    assert [float(row["mean"]) for row in rows] == [150] * 4


def test_keys_and_headings_are_unique_and_groups_known():
    keys = [one.key for one in COMPARISON_COLUMNS]
    assert len(set(keys)) == len(keys)
    assert {one.group for one in COMPARISON_COLUMNS} == set(GROUPS)
    for groups in (("Quality", "Specialization"), GROUPS[2:4], ("Cost",)):
        headings = [one.terminal.heading for one in COMPARISON_COLUMNS if one.group in groups and one.terminal]
        assert len(set(headings)) == len(headings)


def test_every_column_is_read_from_a_full_run_and_missing_from_an_empty_one(folder, tmp_path):
    full = view_run(read_run(folder / "global-s0"), None)
    widths = list(range(8, 8 + full.header.num_experts))  # a cost that differs from token to token
    run = replace(full.run, header=replace(full.header, expert_widths=widths))
    full = replace(full, run=run, config=full.config | {"model.top_p": 0.6})
    empty = view_run(read_run(write_run(tmp_path, header("micro", 0, steps=20), until=0, end="")), None)
    empty = replace(empty, evaluation=None)
    for column in COMPARISON_COLUMNS:
        assert column.read(full) == column.read(full), column.key  # not NaN
        assert column.read(empty) != column.read(empty), column.key


@pytest.mark.parametrize(
    ("key", "tokens"),
    [
        ("train_maxvio_global", 8192),
        ("train_maxvio_micro_batch", 1024),
        ("heldout_maxvio_sequence", 256),
        ("heldout_maxvio_global", 6 * 16384),
    ],
)
def test_the_noise_floor_is_taken_over_as_many_tokens_as_the_maxvio(folder, key, tokens):
    (column,) = [one for one in COMPARISON_COLUMNS if one.key == key]
    assert column.noise_tokens is not None
    assert column.noise_tokens(view_run(read_run(folder / "global-s0"), None)) == tokens
