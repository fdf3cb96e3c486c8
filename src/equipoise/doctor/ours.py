"""What the same configuration asks equipoise for: read as text, and not judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .document import Document

__all__ = ["policies_of"]

VARIABLE = "EQUIPOISE_POLICIES"  # of adapters/ms_swift


def policies_of(document: Document) -> list[str] | None:
    """The policies under ``equipoise:``, or in the variable of ms-swift, as they are written; None without either.

    >>> from pathlib import Path
    >>> policies_of(Document("a.yaml", "yaml", {"equipoise": {"policies": ["global@1e-3", {"kind": "ZLoss"}]}}, Path()))
    ['global@1e-3', 'ZLoss']
    """
    key, variables = document.data.get("equipoise"), document.data.get("ENV")
    if isinstance(key, Mapping):
        return _listed(key.get("policies"))
    in_file = variables.get(VARIABLE) if isinstance(variables, Mapping) else None
    return _listed(in_file if in_file is not None else document.launch.variables.get(VARIABLE))


def _listed(policies: Any) -> list[str] | None:
    if policies is None:
        return None
    if isinstance(policies, str):
        return [] if policies.replace(" ", "") in ("", "[]") else [policies]
    items = policies if isinstance(policies, list) else [policies]
    return [str(one.get("kind", one)) if isinstance(one, Mapping) else str(one) for one in items]
