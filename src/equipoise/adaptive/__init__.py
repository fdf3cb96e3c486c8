"""Adaptive top-k after AdapMoE (arXiv 2408.10284): what each layer's second expert is worth, and what that saves.

model.py        the model that is measured, and hooks that see what its routers return
sensitivity.py  how much a layer's dropped experts cost, from gradients over a text
sweep.py        thresholds against held-out loss, with controls; the knee of the curve
choices.py      which experts are used, and which the layer before would have fetched
caches.py       a cache of experts for each layer, simulated on these choices
"""

from __future__ import annotations

from .caches import CacheUse, allocate, cache_use, stack_distances
from .choices import RecordedChoices, prefetch_hits, record_choices
from .model import AdaptableModel
from .sensitivity import Profile, measure_sensitivity
from .sweep import Held, SweepPoint, budget_for, evaluate, knee, sweep, thresholds_of

__all__ = [
    "AdaptableModel",
    "CacheUse",
    "Held",
    "Profile",
    "RecordedChoices",
    "SweepPoint",
    "allocate",
    "budget_for",
    "cache_use",
    "evaluate",
    "knee",
    "measure_sensitivity",
    "prefetch_hits",
    "record_choices",
    "stack_distances",
    "sweep",
    "thresholds_of",
]
