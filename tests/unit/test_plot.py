"""``equipoise.plot`` is loaded lazily and has the figures of ``report.export.notebook``."""

from __future__ import annotations

import subprocess
import sys

import pytest

import equipoise
from equipoise import plot
from equipoise.report.export import notebook


def test_it_has_every_figure_of_the_notebook():
    assert {name: getattr(plot, name) for name in plot.__all__} == {
        name: getattr(notebook, name) for name in notebook.__all__ if name != "Source"
    }


def test_it_is_loaded_when_it_is_named_and_plotly_when_it_draws():
    assert equipoise.plot is plot
    with pytest.raises(AttributeError, match="no attribute 'plots'"):
        equipoise.plots  # noqa: B018
    program = """import sys, equipoise
assert 'equipoise.plot' not in sys.modules
equipoise.plot.curves
assert 'plotly' not in sys.modules"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
