"""Groups of experts that a run balances or chooses in, read from its header, and how evenly these are loaded."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...storage.run_record import Header
from .run_view import flatten

__all__ = ["Grouping", "group_load", "groupings"]


@dataclass(frozen=True)
class Grouping:
    """Experts in groups: the members of each, and the share of the load that each is to have."""

    members: tuple[tuple[int, ...], ...]
    targets: tuple[float, ...]

    @property
    def name(self) -> str:
        """What a reader calls it.

        >>> Grouping(((0, 1), (2, 3)), (0.5, 0.5)).name, Grouping(((0, 1, 2), (3,)), (0.9, 0.1)).name
        ('2 groups of 2 experts', '2 groups of 1 to 3 experts, with shares of their own')
        """
        sizes = sorted({len(group) for group in self.members})
        held = str(sizes[0]) if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        plain = f"{len(self.members)} groups of {held} expert{'s' * (sizes != [1])}"
        even = [len(group) / len(self.order) for group in self.members]
        return plain if np.allclose(self.targets, even) else f"{plain}, with shares of their own"

    @property
    def order(self) -> list[int]:
        """The experts, group by group."""
        return [expert for group in self.members for expert in group]

    @property
    def starts(self) -> list[int]:
        """Where in ``order`` each group but the first begins."""
        return np.cumsum([len(group) for group in self.members])[:-1].tolist()


def groupings(headers: Iterable[Header]) -> list[Grouping]:
    """The groups that the policies of these runs balance, and those that their routers choose in, each once.

    >>> from types import SimpleNamespace
    >>> line = "AuxLoss(scope='micro_batch', coef=<function f at 0x7f>, groups=2, targets=None)"
    >>> run = SimpleNamespace(policies=[line], config={}, num_experts=4)
    >>> [one.members for one in groupings([run])]
    [((0, 1), (2, 3))]
    """
    found: dict[Grouping, None] = {}
    for header in headers:
        asked = [settings for line in header.policies for settings in _settings(line)]
        asked.append({"groups": flatten(header.config).get("model.num_groups")})
        for settings in asked:
            if made := _grouping(settings.get("groups"), settings.get("targets"), header.num_experts):
                found[made] = None
    return list(found)


def group_load(counts_XE: Any, grouping: Grouping) -> np.ndarray:
    """(X, G): the load of each group over what it is to have, 1 is even; NaN where nothing was counted.

    >>> group_load([[3, 1, 0, 4]], Grouping(((0, 1), (2, 3)), (0.5, 0.5)))
    array([[1., 1.]])
    """
    counts = np.asarray(counts_XE, dtype=np.float64)
    by_group = np.stack([counts[..., list(group)].sum(-1) for group in grouping.members], -1)
    wanted = counts.sum(-1, keepdims=True) * np.asarray(grouping.targets)
    return np.divide(by_group, wanted, out=np.full_like(by_group, np.nan), where=wanted > 0)


def _settings(line: str) -> Iterator[dict[str, Any]]:
    """Keyword arguments with a plain value of every call in a policy's repr; in a Switch there are two policies.

    >>> list(_settings("Switch(at=5, to=AuxLoss(groups=4))"))
    [{'at': 5}, {'groups': 4}]
    """
    shorter = ""
    while shorter != line:  # <function <lambda> at 0x...> is not Python
        shorter, line = line, re.sub(r"<[^<>]*>", "None", line)
    try:
        calls = [node for node in ast.walk(ast.parse(line, mode="eval")) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # not ours: some other program's words
        return
    for call in calls:
        plain = {}
        for keyword in call.keywords:
            try:
                plain[keyword.arg or ""] = ast.literal_eval(keyword.value)
            except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                continue
        yield plain


def _grouping(groups: Any, targets: Any, experts: int) -> Grouping | None:
    """None where there is no group of several experts, or where these are not groups of so many experts."""
    if isinstance(groups, int) and not isinstance(groups, bool):
        if not 1 < groups < experts or experts % groups:
            return None
        size = experts // groups
        groups = [range(first, first + size) for first in range(0, experts, size)]
    if not isinstance(groups, Sequence) or isinstance(groups, str):
        return None
    try:
        members = tuple(tuple(int(expert) for expert in group) for group in groups)
        shares = tuple(float(share) for share in targets or [len(group) / experts for group in members])
    except (TypeError, ValueError):
        return None
    fits = sorted(expert for group in members for expert in group) == list(range(experts))
    several = 1 < len(members) < experts and all(members)
    return Grouping(members, shares) if fits and several and len(shares) == len(members) and min(shares) > 0 else None
