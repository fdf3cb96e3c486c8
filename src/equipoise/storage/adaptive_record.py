"""The result of `equipoise adapt` as typed data, written whole as FOLDER/adaptive.json. Imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import DataError
from .codec import FieldError, Rules, decode, encode, without_nan
from .files import atomic_write

__all__ = ["RECORD_NAME", "AdaptedLayer", "Adaptive", "AdaptiveFacts", "CacheRow", "CurvePoint", "read_adaptive",
           "write_adaptive"]  # fmt: skip

RECORD_NAME = "adaptive.json"
KIND, SCHEMA = "equipoise adapt", 1


@dataclass(frozen=True, kw_only=True)
class AdaptiveFacts:
    """What was measured, and on what."""

    model: str
    family: str
    data: str
    targets: str  # of the gradients: "model" or "text"
    measured_tokens: int  # for the sensitivities
    held_tokens: int  # for the losses, other text
    sequence_length: int
    device: str
    dtype: str
    created: str  # ISO 8601, UTC
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AdaptedLayer:
    """One router. Losses are nats per token of held-out text; NaN for what was not measured."""

    name: str
    experts: int
    top_k: int
    sensitivity: float  # nats per squared weight
    alone: float  # predicted increase of the loss where this layer alone uses one expert a token
    alone_measured: float = math.nan
    threshold: float = 0.0  # of the weight that a token may lose, as saved
    used: float = math.nan  # experts a token, with the thresholds as saved
    predicted: float = math.nan  # share of the used experts that the layer before predicts, all K computed
    predicted_whole: float = math.nan  # share of tokens of which it predicts all
    most_used: float = math.nan  # the first of these by guessing the K busiest experts every time


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """A budget T, and the control that drops as much with one threshold for all layers."""

    budget: float  # nats
    fewer: float  # share of all choices that were dropped in held-out text
    loss: float
    control_weight: float
    control_fewer: float
    control_loss: float


@dataclass(frozen=True, kw_only=True)
class CacheRow:
    """Caches of ``kept`` of all experts, simulated on held-out text."""

    kept: float
    adaptive: bool  # the thresholds as saved, or all K experts
    fitted: bool  # sizes fitted to other text, or the same in every layer
    sizes: list[int]
    hits: float  # share of the used experts
    loads: float  # per token and layer
    waits: float  # those of them that the layer before does not predict


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """Everything that one command found."""

    facts: AdaptiveFacts
    layers: list[AdaptedLayer]
    curve: list[CurvePoint]
    knee: int  # the point of the curve
    saved: CurvePoint  # whose thresholds were saved
    caches: list[CacheRow]
    problems: list[str] = field(default_factory=list)


def write_adaptive(folder: Path, found: Adaptive) -> None:
    """Raises OutputError."""
    content = {"kind": KIND, "schema": SCHEMA, **without_nan(encode(found))}
    atomic_write(folder / RECORD_NAME, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def read_adaptive(folder: Path) -> Adaptive:
    """The inverse. Raises DataError."""
    path = Path(folder) / RECORD_NAME
    try:
        found = json.loads(path.read_bytes())
        if found.pop("kind", None) != KIND or found.pop("schema", None) != SCHEMA:
            raise FieldError("kind", f"{KIND!r}, version {SCHEMA}", "another")
        return decode(Adaptive, found, Rules(null_is_nan=True))
    except (OSError, ValueError, TypeError, AttributeError, FieldError) as error:
        raise DataError(
            expected=f"the result of equipoise adapt in {path}", got=str(error)[:160], do="run equipoise adapt again"
        ) from None
