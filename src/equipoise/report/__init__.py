"""Reports on runs and inspections: tables in the terminal, one HTML file, CSV and pictures. Imports no torch."""

from __future__ import annotations

from .data.comparison import Comparison, StrategySummary
from .data.load import load, load_runs
from .data.summarize import summarize, to_json
from .html.page import write_html
from .text.comparison import render_terminal

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
