"""How a policy sees the load: what it was given as groups, costs and targets, checked when it is made."""

from __future__ import annotations

from typing import Any

from ..functional.load_view import load_view

__all__ = ["keep_view"]


def keep_view(policy: Any) -> None:
    """Sets ``policy.view`` of a frozen policy, and the lists that it is made of to tuples, which can be hashed.

    Raises ConfigError as `load_view` does.
    """
    given = {name: getattr(policy, name, None) for name in ("groups", "costs", "targets")}
    view = load_view(**given)
    object.__setattr__(policy, "view", view)
    if view is not None:
        for name, value in view._asdict().items():
            if given[name] is not None:
                object.__setattr__(policy, name, value)
