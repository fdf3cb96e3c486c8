"""Processes that meet through a store which remembers those of earlier attempts."""

from __future__ import annotations

import threading
import time

import pytest
from torch.distributed import HashStore

from equipoise.errors import StateError
from equipoise.lab.training.rendezvous import rendezvous


def meeting(store, size, late: dict[int, float] | None = None) -> list[str]:
    """What each of ``size`` ranks, threads here, is told; some begin late."""
    names = [""] * size

    def rank(number: int) -> None:
        time.sleep((late or {}).get(number, 0.0))
        names[number] = rendezvous(store, number, size, 10.0)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("late", [{}, {0: 0.2}, {1: 0.2, 3: 0.1}])
def test_all_are_told_one_name_and_each_attempt_another(late):
    store = HashStore()
    attempts = [meeting(store, 4, late) for _ in range(3)]
    assert all(len(set(names)) == 1 and names[0] for names in attempts)
    assert len({names[0] for names in attempts}) == 3


def test_what_a_dead_attempt_left_behind_misleads_nobody():
    """Ranks that asked and died, with rank 0 or without, and one that was told the old name."""
    store = HashStore()
    for rank in (1, 2):
        with pytest.raises(StateError, match="fewer after"):
            rendezvous(store, rank, 3, 0.05)
    with pytest.raises(StateError, match="3 processes to begin together"):
        rendezvous(store, 0, 3, 0.1)
    names = meeting(store, 3, {0: 0.1, 2: 0.2})
    assert len(set(names)) == 1


def test_alone_nobody_is_asked():
    assert len(rendezvous(HashStore(), 0, 1, 0.0)) == 32
