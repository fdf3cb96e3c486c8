"""Rendezvous of the processes that torchrun started, without those of an earlier attempt.

torchrun may keep one store for all its restarts (torch 2.13 does). A backend that finds there the addresses of ranks
that are dead never starts, and the number of restarts is no name for an attempt: it is not the same on every machine.
"""

from __future__ import annotations

import time
import uuid
from typing import Protocol

from ...errors import StateError

__all__ = ["Store", "rendezvous"]

PAUSE = 0.02


class Store(Protocol):
    """What is used of ``torch.distributed.Store``."""

    def set(self, key: str, value: str, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def check(self, keys: list[str], /) -> bool: ...


def rendezvous(store: Store, rank: int, size: int, seconds: float) -> str:
    """A name that the ``size`` processes alive now agree on, and no earlier ones.

    Rank 0 draws it and answers each rank under a key that only that rank knows; it returns when all ranks have used the
    name. Raises StateError where they do not come together within ``seconds``.

    >>> len(rendezvous(store=None, rank=0, size=1, seconds=1.0))
    32
    """
    mine, deadline = uuid.uuid4().hex, time.monotonic() + seconds

    def absent(*keys: str) -> bool:
        if time.monotonic() > deadline:
            raise StateError(
                expected=f"{size} processes to begin together",
                got=f"fewer after {seconds:.0f} s",
                do="look at what torchrun prints on every machine",
            )
        return not store.check(list(keys))

    if rank > 0:
        store.set(f"meet/{rank}", mine)
        while absent(f"meet/{mine}"):
            time.sleep(PAUSE)
        name = store.get(f"meet/{mine}").decode()
        store.set(f"{name}/{rank}", "here")
        return name
    told: dict[int, str] = {}
    while size > 1 and absent(*(f"{mine}/{other}" for other in range(1, size))):
        for other in range(1, size):
            if store.check([f"meet/{other}"]):
                asking = store.get(f"meet/{other}").decode()
                if told.get(other) != asking:
                    store.set(f"meet/{asking}", mine)
                    told[other] = asking
        time.sleep(PAUSE)
    return mine
