"""`benchmarks/moe_layer.py` compares what is the same, covers its grid and goes on where it was killed. No times."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
FILE = FOLDER / "moe_layer.py"


@pytest.fixture
def bench(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    names = ("_contestants", "_contest", "_grid")
    return SimpleNamespace(**{name.lstrip("_"): importlib.import_module(name) for name in names})


@pytest.fixture
def point(bench):
    return bench.contestants.Point(tokens=64, dim=32, hidden=16, experts=8, top_k=2, dtype="fp32", skew=1.0)


def test_one_point_end_to_end():
    command = [sys.executable, str(FILE), "--size", "64,32,16,8,2", "--dtype", "fp32", "--rounds", "3", "--skew", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "torch 2" in done.stdout
    line = re.search(r"64,32,16,8,2 +2 +1 +fp32 +[\d.]+ +[\d.]+ [\d.]+-[\d.]+ +(\S+) +[\d.]+ +[\d.]+x", done.stdout)
    assert line is not None, done.stdout
    assert line[1] in {"index_add", "unsort", "hf-grouped", "hf-eager", "hf-batched"}
    assert max(map(len, done.stdout.splitlines())) <= 120


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_every_contestant_gives_the_same_outputs_and_gradients(bench, point, top_k):
    contest, contestants, point = bench.contest, bench.contestants, dataclasses.replace(point, top_k=top_k)
    x_TD = contestants.draw(point)
    named = [name for name in contestants.CONTESTANTS if contestants.refusal(name, point) is None]
    found = {name: contest.answers(contestants.build(name, point), x_TD.clone()) for name in named}
    for name in found.keys() - {"dense"}:
        contest.check(name, found[name], found["ours"], "fp32")
    with pytest.raises(SystemExit, match="dense: the outputs differ"):
        contest.check("dense", found["dense"], found["ours"], "fp32")
    wrong = [found["ours"][0], 1.01 * found["ours"][1]]
    with pytest.raises(SystemExit, match="gradients differ"):
        contest.check("index_add", wrong, found["ours"], "fp32")


def test_skew_is_what_each_expert_s_logits_share(bench):
    import torch

    torch.manual_seed(0)
    point = bench.contestants.Point(tokens=4096, dim=64, hidden=8, experts=4, top_k=1, dtype="fp32", skew=2.0)
    shared = torch.stack([bench.contestants.draw(point).mean(dim=0) for _ in range(64)])
    assert abs(shared.var() - 4 / 5) < 0.06  # of unit variance, skew^2 / (1 + skew^2)
    assert (shared[0] - shared[1]).norm() > 1  # another direction at each call


def test_the_sample_has_every_pair_of_values_and_all_corners(bench):
    axes = bench.grid.AXES
    points = bench.grid.sample(axes)
    assert len(points) == len(set(points)) <= 32
    rows = [{**vars(point), "width": (point.dim, point.hidden)} for point in points]
    for one, two in itertools.combinations(axes, 2):
        assert {(row[one], row[two]) for row in rows} == set(itertools.product(axes[one], axes[two]))
    corners = {(row["tokens"], row["experts"], row["top_k"]) for row in rows}
    assert corners >= set(itertools.product((256, 16384), (8, 256), (1, 8)))
    assert set(points) <= set(bench.grid.every(axes))


def test_a_killed_grid_goes_on_and_another_machine_begins_again(bench, point, tmp_path, capsys):
    asked = []

    def measure(point):
        asked.append(point)
        return {"point": vars(point)}

    points = [bench.contestants.Point(tokens, 8, 8, 4, 1) for tokens in (1, 2, 3)]
    file, where = tmp_path / "grid.jsonl", {"machine": "this"}
    assert len(list(bench.grid.run(points[:2], measure, file, where, 99))) == 2
    whole = file.read_text()
    file.write_text(whole[:-5])  # killed while it wrote
    found = list(bench.grid.run(points, measure, file, where, 99))
    assert asked == [*points[:2], *points[1:]]
    assert [each["point"]["tokens"] for each in found] == [1, 2, 3]
    assert sum(json.loads(line)["where"] == where for line in file.read_text().splitlines()[-2:]) == 2
    assert list(bench.grid.run(points, measure, file, {"machine": "other"}, -1)) == []
    assert "goes on" in capsys.readouterr().err


def test_the_worst_points_are_named(bench):
    points = [bench.contestants.Point(tokens, 8, 8, 4, 1) for tokens in (1, 2, 3)]
    found = [
        {"point": vars(point), "best": "unsort", "ratio": {"unsort": [ratio, ratio, ratio]}}
        for point, ratio in zip(points, (0.9, 0.96, 0.5), strict=True)
    ]
    said = bench.grid.worst(found).splitlines()
    assert said[0] == "slower than 1.05x the best peer: 2 of 3 points"
    assert said[1].startswith("  2.00x") and "3,8,8,4,1" in said[1]


def test_help_teaches_on_80_columns():
    text = FILE.read_text(encoding="utf-8").split('"""')[1]
    assert "--grid full" in text and "hf-batched" in text
    assert max(map(len, text.splitlines()[1:])) <= 80
