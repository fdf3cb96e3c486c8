"""Figures for a notebook: curves, MaxVio, loads over time, experts by domain. Drawing one needs plotly."""

from __future__ import annotations

from .report.export.notebook import curves, domains, load_over_time, loads, maxvio

__all__ = ["curves", "domains", "load_over_time", "loads", "maxvio"]
