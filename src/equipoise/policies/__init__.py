"""Policies: a scope (over which tokens is the load measured?) and a force (what pushes it back?)."""

from __future__ import annotations

from .estimators import ESTIMATORS
from .expert_bias import BIAS_SCOPES, RULES, ExpertBias
from .from_data import policies_from
from .losses import AuxLoss, EntropyLoss, ZLoss
from .schedule import Schedule
from .scopes import SCOPES, Sequences
from .self_setting import Ratio, Target
from .switch import Policy, Switch

__all__ = [
    "BIAS_SCOPES",
    "ESTIMATORS",
    "RULES",
    "SCOPES",
    "AuxLoss",
    "EntropyLoss",
    "ExpertBias",
    "Policy",
    "Ratio",
    "Schedule",
    "Sequences",
    "Switch",
    "Target",
    "ZLoss",
    "policies_from",
]
