"""What imbalance costs on a cluster: loads -> slowest rank -> seconds and bytes of a step. numpy, no torch.

cluster.py     the machine, the model and how they are cut        presets.py   models and GPUs by name
loads.py       a law of skewed shares, or recorded counts         observed.py  records and files of counts
straggler.py   largest / mean load of the ranks, simulated        strategies.py  typical skew of each strategy
cost.py        seconds and bytes of a step                        outlook.py   all of it; growth with the ranks
check.py       the published step times that it has to meet       terminal.py  as text
"""

from __future__ import annotations

from .calibration import check
from .cluster import Cluster, describe, parse_settings, read_toml
from .forecast import outlook, to_json
from .loads import Recorded, Skew, fit
from .recorded_loads import observe
from .straggler import straggler
from .text import render_check, render_outlook, render_presets
from .typical_skews import Strategy, needs_counts, typical

__all__ = ["Cluster", "Recorded", "Skew", "Strategy", "check", "describe", "fit", "needs_counts", "observe", "outlook",
           "parse_settings", "read_toml", "render_check", "render_outlook", "render_presets", "straggler", "to_json",
           "typical"]  # fmt: skip
