"""What people miss in the numbers of a step, named, with what to do. Pure: from a number a layer to a list of layers.

>>> signals({"maxvio_global": [1.2, 0.1], "maxvio_gate": [0.01, 0.01]}, pushes=[])
{'flat_gate': [0]}
>>> SIGNALS["flat_gate"].says
'loads are uneven and the gate is flat, so the balance loss is at its least and pushes no more'
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .bias_drift import LONG

__all__ = ["SIGNALS", "Signal", "signals"]

FLAT, UNEVEN = 0.1, 0.5  # MaxVio of the mean probabilities; of the loads, above what chance shows
WIDE = 1.0  # all that two scores of a sigmoid or a softmax can differ by


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
        "the gradient of a balance loss is larger than the language model's at the router, which learns to balance and "
        "not to choose",
        "take a smaller coefficient, or Ratio(0.01)",
    ),
    "wide_bias": Signal(
        "biases differ by more than scores can: some experts are chosen before others whatever a token's scores are",
        "take a smaller rate, or one that decays; look for a layer whose loads no bias can even out",
    ),
    "drifting_bias": Signal(
        "biases have moved one way for hundreds of steps, and an expert still has less than half of its share or more "
        "than half too much: the balance is chased and not met",
        "take a larger rate; or look for an expert that no bias can fill, because its logits are masked",
    ),
}


def signals(
    loads: Mapping[str, Sequence[float]],
    *,
    chance: Sequence[float] = (),
    pushes: Sequence[Sequence[float]] | None = None,
    language: Sequence[float] = (),
) -> dict[str, list[int]]:
    """Name of a signal -> the layers that show it, in the model's order; without those that none shows.

    Args:
        loads: of each layer ``maxvio_global``, ``maxvio_gate`` and, where biases have moved, ``bias_drift``, the
            largest of its experts; where they are added to scores of at most 1, ``bias_range``.
        chance: of each layer the MaxVio of random routing.
        pushes: of each balance loss that acts the squared norm of its gradient at each layer; None: none acts.
        language: of each layer the squared norm of the language model's gradient.
    """
    uneven, gate = loads.get("maxvio_global", ()), loads.get("maxvio_gate", ())
    floor = chance or [0.0] * len(uneven)
    flat = [i for i, one in enumerate(uneven) if one > UNEVEN + floor[i] and gate[i] < FLAT]
    found = {
        "flat_gate": flat if pushes is not None else [],
        "outweighs": [i for i, own in enumerate(language) if any(0 < own < square[i] for square in pushes or ())],
        "wide_bias": [i for i, width in enumerate(loads.get("bias_range", ())) if width > WIDE],
        "drifting_bias": [i for i, drift in enumerate(loads.get("bias_drift", ())) if drift > LONG],
    }
    return {name: layers for name, layers in found.items() if layers}
