"""The version of what a run computes, beyond rounding.

``NUMERICS`` is part of a run's identity (`evidence.run_summary.run_key`): results of two versions are not mixed. Raise
it when `tests/unit/lab/training/test_numerics.py` says that the loss curve is another, and put the new curve there.
"""

from __future__ import annotations

__all__ = ["NUMERICS"]

NUMERICS = 1
