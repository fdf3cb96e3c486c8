"""What all tests of the report share: a made-up comparison of 4 strategies × 2 seeds, two inspections."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.report import Comparison, load_runs, summarize, write_html
from equipoise.storage.inspection_record import Inspection
from unit.report.synthetic import write_comparison
from unit.report.synthetic_inspection import synthetic_inspection


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    return write_comparison(tmp_path_factory.mktemp("comparison"), steps=150)


@pytest.fixture(scope="session")
def comparison(folder) -> Comparison:
    return summarize(load_runs([folder])[0])


@pytest.fixture(scope="session")
def inspections() -> list[Inspection]:
    """Two models, the first sharper, deeper, and with a second checkpoint."""
    return [
        synthetic_inspection(domains=4, layers=3, against=True, sharpness=1.0, model="models/sharp"),
        synthetic_inspection(domains=4, layers=2, sharpness=0.2, model="models/blunt", seed=1),
    ]


@pytest.fixture(scope="session")
def page_of_all(comparison, inspections, tmp_path_factory) -> Path:
    return write_html(comparison, tmp_path_factory.mktemp("page") / "report.html", inspections)
