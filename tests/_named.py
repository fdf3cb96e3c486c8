"""Policies named by their place, for references that compare metrics and know nothing of scopes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any


def named(policies: Iterable[Any]) -> list[Any]:
    """``policy_0``, ``policy_1``, ...; a Switch keeps the names of its sides."""
    return [
        dataclasses.replace(policy, name=f"policy_{i}") if hasattr(policy, "name") else policy
        for i, policy in enumerate(policies)
    ]
