"""What ``begin_step`` said of a step: its router tokens, for all routers or for each by name, and its micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import InputError

__all__ = ["DeclaredStep"]


@dataclass(frozen=True)
class DeclaredStep:
    """Nothing is said by default.

    >>> DeclaredStep.of({"trunk": 48, "mtp": 44}, 2, ["trunk.0.gate", "trunk.1.gate", "mtp.gate"], "mean").tokens
    {'trunk.0.gate': 48.0, 'trunk.1.gate': 48.0, 'mtp.gate': 44.0}
    """

    tokens: float | Mapping[str, float] | None = None
    micro_batches: int | None = None

    @staticmethod
    def of(
        tokens: float | Mapping[str, float] | None, micro_batches: int | None, routers: Sequence[str], reduction: str
    ) -> DeclaredStep:
        """Raises InputError for a number that is none, a router that is left out, or a name that no router has."""
        by_name = isinstance(tokens, Mapping)
        if by_name:
            tokens = _by_router(tokens, routers)
        for number in tokens.values() if isinstance(tokens, Mapping) else () if tokens is None else (tokens,):
            if not (number > 0 or (by_name and number == 0)):
                raise InputError(
                    expected="tokens > 0", got=repr(number), do="count the router's valid tokens of the step"
                )
        if tokens is not None and micro_batches is None and reduction == "mean":
            raise InputError(
                expected="micro_batches beside tokens, because the losses are means",
                got="tokens alone",
                do="begin_step(tokens=..., micro_batches=M), or Balancer(reduction='sum')",
            )
        return DeclaredStep(tokens, micro_batches)

    def of_router(self, name: str) -> float | None:
        """The tokens that were said for a router."""
        return self.tokens.get(name) if isinstance(self.tokens, Mapping) else self.tokens


def _by_router(tokens: Mapping[str, float], routers: Sequence[str]) -> dict[str, float]:
    """The number of the longest name that a router's begins with."""
    said: dict[str, float] = {}
    for router in routers:
        fits = [name for name in tokens if router == name or router.startswith(f"{name}.") or not name]
        if not fits:
            raise InputError(
                expected="tokens for every router, by its name or the beginning of it",
                got=f"none for {router!r} among {', '.join(map(repr, tokens))}",
                do="add it; {'': n} is for all that have no other name",
            )
        said[router] = float(tokens[max(fits, key=len)])
    unknown = [name for name in tokens if not any(r == name or r.startswith(f"{name}.") or not name for r in routers)]
    if unknown:
        raise InputError(
            expected=f"names of routers, or what they begin with: {', '.join(map(repr, routers[:6]))}",
            got=", ".join(map(repr, unknown)),
            do="balancer.describe() lists all routers",
        )
    return said
