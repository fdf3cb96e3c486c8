"""Routing replay: the experts that one run of a model chose are dispatched again in another (R2 and R3 in RL)."""

from __future__ import annotations

from .contexts import record_routing, replay_routing
from .record import RoutingRecord

__all__ = ["RoutingRecord", "record_routing", "replay_routing"]
