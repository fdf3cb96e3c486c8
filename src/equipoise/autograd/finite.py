"""NaN logits are an error where they appear, except while a pipeline infers shapes on uninitialised memory.

Before the first step, a ``PipelineStage`` that was not told its shapes runs each stage forward and backward on such
memory (torch 2.13). That pass may hold NaN, and must not count as a micro-batch.
"""

from __future__ import annotations

import sys

from torch import Tensor

from ..errors import InputError
from ..functional.routing import check_finite

__all__ = ["check_logits", "in_shape_inference"]


def in_shape_inference() -> bool:
    """Whether a pipeline's shape inference is the caller; a walk up the stack, a few microseconds.

    >>> in_shape_inference()
    False
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name.endswith("_metadata_inference") and "pipelining" in frame.f_globals.get("__name__", ""):
            return True
        frame = frame.f_back
    return False


def check_logits(logits_TE: Tensor, *, masked: bool = False, name: str = "") -> None:
    """`functional.routing.check_finite` for a router inside a model. Raises InputError."""
    try:
        check_finite(logits_TE, masked=masked, name=name)
    except InputError:
        if not in_shape_inference():
            raise
