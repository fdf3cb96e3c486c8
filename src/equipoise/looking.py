"""Whose values can be looked at: a CPU's at any time, a GPU's only by making everybody wait."""

from __future__ import annotations

import torch

__all__ = ["AT_HAND", "at_hand"]

AT_HAND = {"cpu"}  # types of devices whose values can be read without waiting for them; tests take the CPU out


def at_hand(device: torch.device) -> bool:
    """Whether a value on this device can be looked at without waiting.

    >>> at_hand(torch.device("cpu")), at_hand(torch.device("cuda"))
    (True, False)
    """
    return device.type in AT_HAND
