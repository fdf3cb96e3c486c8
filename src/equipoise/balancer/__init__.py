"""What happens around a training step: coefficients, the one sum over ranks, the commit, metrics."""

from __future__ import annotations

from .balancer import Balancer

__all__ = ["Balancer"]
