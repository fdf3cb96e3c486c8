"""Which layers a command line names: ``0,2-4,-1``."""

from __future__ import annotations

from ...errors import ConfigError

__all__ = ["layers_of"]


def layers_of(text: str, count: int, what: str = "layers") -> list[int]:
    """Indices of the layers that ``--layers`` names, of ``count``; all for an empty text. Raises ConfigError.

    >>> layers_of("0,2-3,-1", 6), layers_of("", 2)
    ([0, 2, 3, 5], [0, 1])
    """
    chosen: set[int] = set()
    for part in text.replace(" ", "").split(",") if text else [f"0-{count - 1}"]:
        first, dash, last = part[1:].partition("-") if part.startswith("-") else part.partition("-")
        try:
            start = int(first) * (-1 if part.startswith("-") else 1)
            stop = int(last) if dash else start
            places = range(start, stop + 1) if dash else [start]
        except ValueError:
            places = []
        if not places or any(not -count <= place < count for place in places):
            raise ConfigError(expected=f"--layers of 0 to {count - 1}: this model has {count} {what}", got=repr(part),
                              do="for example 0,2-4,-1")  # fmt: skip
        chosen |= {place % count for place in places}
    return sorted(chosen)
