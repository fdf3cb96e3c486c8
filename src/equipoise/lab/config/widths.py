"""``model.expert_widths``: the widths of a layer's experts from their ratios, as large together as equal ones."""

from __future__ import annotations

import re

from ...errors import ConfigError

__all__ = ["SHAPES", "expert_widths"]

# HMoE's three (arXiv 2408.10681), which it has for 8 experts, for any number of them.
SHAPES = ("arithmetic", "geometric", "hybrid")


def expert_widths(text: str, experts: int, hidden: int) -> tuple[int, ...] | None:
    """A width for each expert; they sum to ``experts * hidden``. None for "": all are ``hidden`` wide.

    Args:
        text: ratios, "9:11:13:15:17:19:21:23", or a name: "arithmetic" are these, 9 and 2 more each; "geometric"
            1:2:4:8:...; "hybrid" half of the experts 1, a quarter 2, a quarter 4.

    Raises ConfigError for ratios that are not one for each expert and above 0, and for experts of width 0.

    >>> expert_widths("arithmetic", experts=8, hidden=64)
    (36, 44, 52, 60, 68, 76, 84, 92)
    >>> expert_widths("1:1:2", experts=3, hidden=5)
    (4, 4, 7)
    """
    if not text:
        return None
    ratios = _ratios(text, experts)
    total = experts * hidden
    exact = [total * ratio / sum(ratios) for ratio in ratios]
    widths = [int(width) for width in exact]
    nearest = sorted(range(experts), key=lambda e: (widths[e] - exact[e], -e))  # what rounding down took the most from
    for e in nearest[: total - sum(widths)]:
        widths[e] += 1
    if min(widths) < 1:
        raise ConfigError(
            expected=f"experts that {total} hidden units in these ratios leave a width",
            got=f"model.expert_widths = {text!r}: {':'.join(map(str, widths))}",
            do="raise model.expert_hidden, or choose ratios that lie nearer together",
        )
    return tuple(widths)


def _ratios(text: str, experts: int) -> list[float]:
    match text:
        case "arithmetic":
            return [9.0 + 2 * e for e in range(experts)]
        case "geometric":
            return [2.0**e for e in range(experts)]
        case "hybrid":
            return [1.0 if 2 * e < experts else 2.0 if 4 * e < 3 * experts else 4.0 for e in range(experts)]
    if not re.fullmatch(r"\d+(\.\d+)?(:\d+(\.\d+)?)*", text) or not all(ratios := [float(r) for r in text.split(":")]):
        raise ConfigError(
            expected=f"model.expert_widths as ratios above 0, or one of {', '.join(SHAPES)}",
            got=repr(text),
            do="for example 9:11:13:15:17:19:21:23 for 8 experts",
        )
    if len(ratios) != experts:
        raise ConfigError(
            expected=f"a ratio for each of model.experts = {experts}",
            got=f"{len(ratios)} in model.expert_widths = {text!r}",
            do=f"give {experts}, or a name: {', '.join(SHAPES)}",
        )
    return ratios
