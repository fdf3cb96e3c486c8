"""Looks inside a model: which of its experts see which text. Text in, one folder of numbers out."""

from __future__ import annotations

from .run import Request, inspect
from .summary import summarize_inspection

__all__ = ["Request", "inspect", "summarize_inspection"]
