"""How much differences in perplexity vary between seeds, for the models where that has been measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Spread", "known_spread"]


@dataclass(frozen=True)
class Spread:
    """Standard deviation of the paired difference in held-out loss over ``seeds``, in nats (0.01 is 1 %)."""

    sd: float
    seeds: int
    source: str


# The lab's default run on the text of the installation. Another size, length or learning rate may vary far more:
# 3 layers of width 128 vary by 0.04 to 0.08.
DEFAULT: dict[str, object] = {
    "model.layers": 2, "model.width": 64, "model.experts": 8, "model.top_k": 2, "model.expert_hidden": 64,
    "model.expert_widths": "", "model.top_p": 0.0, "model.vocab_size": 2048, "data.data": None,
    "data.sequence_length": 256, "train.steps": 240, "train.lr": 3e-3, "train.micro_batches": 32,
    "train.sequences_per_micro_batch": 1,
}  # fmt: skip
KNOWN = ((DEFAULT, Spread(0.0058, 8, "lab-notes/2026-11-28-quiet-model.md")),)


def known_spread(config: Mapping[str, object]) -> Spread | None:
    """The spread of runs with this configuration, by dotted name; None if it has not been measured.

    >>> known_spread({**DEFAULT, "train.steps": 40}) is None
    True
    """
    missing = object()
    for settings, spread in KNOWN:
        if all(config.get(key, missing if value else value) == value for key, value in settings.items()):
            return spread
    return None
