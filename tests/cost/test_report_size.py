"""The benchmark of the report's size: its records become pages, and what is above a bound is marked."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("report_size")


def test_every_case_is_measured(bench, tmp_path):
    cases = bench.make(tmp_path, bench.Sizes(layers=2, experts=8, domains=3, seeds=2, steps=20, checkpoints=2))
    found = [bench.measure(name, paths, 1, lambda page: None) for name, paths in cases.items()]
    assert [one.name for one in found] == ["comparison", "inspection", "training", "all"]
    sizes = {one.name: one.megabytes for one in found}
    assert 2 < sizes["inspection"] < sizes["training"] < sizes["all"] < 8  # plotly alone is 2
    assert not any(one.above for one in found)


def test_what_is_above_a_bound_is_marked(bench):
    found = [bench.Found(*one) for one in (("a", 7.9, [5.0], None), ("b", 8.1, [1.0], 1.0), ("c", 1.0, [1.0], 6.5))]
    lines = bench.table(found).splitlines()
    assert [line.endswith("!") for line in lines[1:4]] == [False, True, True]
