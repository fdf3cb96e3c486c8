"""One made-up comparison for all tests of the report: 4 strategies × 2 seeds."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.report import Comparison, load_runs, summarize
from report.synthetic import write_comparison


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("comparison"), steps=150)


@pytest.fixture(scope="session")
def comparison(folder) -> Comparison:
    return summarize(load_runs([folder])[0])
