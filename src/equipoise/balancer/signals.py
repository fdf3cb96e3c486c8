"""What people miss in the numbers of a step, named, with what to do. Pure: from a number a layer to a list of layers.

>>> signals({"maxvio_global": [1.2, 0.1], "maxvio_gate": [0.01, 0.01]}, {"micro/loss": [1.0, 1.0]})
{'flat_gate': [0]}
>>> SIGNALS["flat_gate"].says
'loads are uneven and the gate is flat, so the balance loss is at its least and pushes no more'
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["SIGNALS", "Signal", "signals"]

FLAT, UNEVEN = 0.1, 0.5  # MaxVio of the mean probabilities, of the loads
WIDE = 1.0  # the largest score of a sigmoid or a softmax


class Signal(NamedTuple):
    """What it is called in ``balance/signals/...``: how many layers show it; what that means; what helps."""

    says: str
    do: str


SIGNALS = {
    # E f . P is 1 for any f once P is uniform (Sigma-MoE-Tiny, arXiv 2512.16248)
    "flat_gate": Signal(
        "loads are uneven and the gate is flat, so the balance loss is at its least and pushes no more",
        "a larger coefficient flattens more: use ExpertBias, which counts choices, or a smaller one",
    ),
    "outweighs": Signal(
        "the balance gradient is larger than the language model's at the router, which learns to balance and not to "
        "choose",
        "take a smaller coefficient, or Ratio(0.01)",
    ),
    "wide_bias": Signal(
        "a bias is larger than any score: its expert is chosen, or never, whatever a token's scores are",
        "take a smaller rate, or one that decays; look for a layer whose loads no bias can even out",
    ),
}


def signals(
    loads: Mapping[str, Sequence[float]],
    policies: Mapping[str, Sequence[float]],
    language: Sequence[float] = (),
) -> dict[str, list[int]]:
    """Name of a signal -> the layers that show it, in the model's order; without those that none shows.

    Args:
        loads: of each layer ``maxvio_global``, ``maxvio_gate`` and, where biases are added to scores, ``bias_max``.
        policies: of each layer ``<name>/loss``, and as ``<name>/gradient_ratio`` the squared norm of its gradient.
        language: of each layer the squared norm of the language model's gradient.
    """
    nothing = [math.nan] * max(map(len, loads.values()), default=0)
    uneven, gate = loads.get("maxvio_global", nothing), loads.get("maxvio_gate", nothing)
    pushed = any(key.endswith("/loss") for key in policies)
    squares = [numbers for key, numbers in policies.items() if key.endswith("/gradient_ratio")]
    found = {
        "flat_gate": [i for i, flat in enumerate(gate) if pushed and flat < FLAT and uneven[i] > UNEVEN],
        "outweighs": [i for i, own in enumerate(language) if any(0 < own < square[i] for square in squares)],
        "wide_bias": [i for i, width in enumerate(loads.get("bias_max", ())) if width > WIDE],
    }
    return {name: layers for name, layers in found.items() if layers}
