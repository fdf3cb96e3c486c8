"""Reports on runs: records in, a summary, a terminal table and one HTML file out. Imports no torch."""

from __future__ import annotations

from .html import write_html
from .sources import load, load_runs
from .summary import Comparison, StrategySummary, summarize, to_json
from .terminal import render_terminal

__all__ = [
    "Comparison",
    "StrategySummary",
    "load",
    "load_runs",
    "render_terminal",
    "summarize",
    "to_json",
    "write_html",
]
