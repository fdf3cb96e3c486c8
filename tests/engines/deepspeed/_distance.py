"""How far a balance part is from the law."""

from __future__ import annotations

__all__ = ["far"]


def far(law: dict, bare: dict, balanced: dict, plain: dict, part: str = "") -> float:
    """Of the balance part, from that of the law, relative to it."""
    names = [name for name in law if part in name]
    assert names and set(names) <= set(balanced)
    wanted = {name: law[name].double() - bare[name].double() for name in names}
    got = {name: balanced[name].double() - plain[name].double() for name in names}
    off = sum(float((got[name] - wanted[name]).square().sum()) for name in names)
    return (off / sum(float(one.square().sum()) for one in wanted.values())) ** 0.5
