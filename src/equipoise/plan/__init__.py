"""What imbalance costs on a cluster: loads -> slowest rank -> seconds and bytes of a step. numpy, no torch.

cluster.py    the GPUs, links and model               presets.py         models and GPUs by name
loads.py      a law of skewed shares, or counts       recorded_loads.py  loads from runs, inspections and count files
straggler.py  largest / mean load of the ranks        typical_skews.py   loads where none were recorded
cost.py       seconds and bytes of a step             calibration.py     the model against published step times
scenario.py   cluster and strategies of a forecast    forecast.py        all numbers, and growth with the ranks
text.py       a forecast as text                        page.py           a forecast as a page with figures
"""

from __future__ import annotations

from .calibration import calibrate
from .cluster import Cluster, describe, parse_settings, read_toml
from .forecast import forecast, to_json
from .loads import RecordedCounts, Skew, fit
from .page import render_page, write_page
from .recorded_loads import read_recorded_loads
from .scenario import Scenario, make_scenario
from .straggler import straggler
from .text import render_calibration, render_forecast, render_presets
from .typical_skews import Strategy, needs_counts, typical

__all__ = [
    "Cluster",
    "RecordedCounts",
    "Scenario",
    "Skew",
    "Strategy",
    "calibrate",
    "describe",
    "fit",
    "forecast",
    "make_scenario",
    "needs_counts",
    "parse_settings",
    "read_recorded_loads",
    "read_toml",
    "render_calibration",
    "render_forecast",
    "render_page",
    "render_presets",
    "straggler",
    "to_json",
    "typical",
    "write_page",
]
