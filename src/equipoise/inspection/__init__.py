"""Inspects which experts of a model process which text, and writes the measures to a folder."""

from __future__ import annotations

from .run import Request, inspect
from .summary import summarize_inspection

__all__ = ["Request", "inspect", "summarize_inspection"]
