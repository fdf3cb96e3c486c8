"""Scopes: over which tokens a load is measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from ..errors import ConfigError, unknown_name

__all__ = ["SCOPES", "Scope", "Sequences", "check_policy_name", "check_scope"]

SCOPES = ("sequence", "document", "micro_batch", "data_parallel", "global_batch", "shuffle")


@dataclass(frozen=True)
class Sequences:
    """n neighbouring sequences share one f: the paper's Balance BSZ, for sweeps (arXiv 2501.11873, Fig. 2).

    Up to the size of a micro-batch, f is exact. Beyond it, a window runs over the micro-batches of a step and f is that
    of the window so far (the paper's buffer); a new step starts a new window. Depends on the cut by definition.

    >>> Sequences(8)
    Sequences(n=8)
    """

    n: int

    def __post_init__(self) -> None:
        if not (isinstance(self.n, int) and self.n >= 1):
            raise ConfigError(
                expected="Sequences(n) with a whole n >= 1", got=f"n={self.n!r}", do="Sequences(1) is scope 'sequence'"
            )


Scope = str | Sequences


def check_scope(scope: Scope) -> Scope:
    """Raises ConfigError for an unknown scope; 'Sequences' by name lacks its n.

    >>> check_scope("sequence")
    'sequence'
    """
    if isinstance(scope, Sequences) or scope in SCOPES:
        return scope
    raise unknown_name("scope (or Sequences(n))", scope, SCOPES)


def check_policy_name(name: str | None) -> None:
    """Raises ConfigError for a name that cannot be part of a metric's: ``balance/<name>/loss``.

    >>> check_policy_name("global")
    """
    if name is not None and not (isinstance(name, str) and re.fullmatch(r"(?!layer_)[A-Za-z][A-Za-z0-9_.-]*", name)):
        raise ConfigError(
            expected="a policy's name of letters, digits, '_', '-' and '.', a letter first, not 'layer_...'",
            got=repr(name),
            do='for example name="global", whose metrics are balance/global/loss and .../gradient_ratio',
        )
