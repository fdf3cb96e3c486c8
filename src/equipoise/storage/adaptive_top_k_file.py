"""The file that says where a model's tokens use fewer experts: a threshold for each router. JSON; imports no torch."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError
from .codec import FieldError, Rules, decode, encode
from .files import atomic_write

__all__ = ["FILE", "SavedThreshold", "SavedTopK", "read_top_k", "top_k_file", "write_top_k"]

FILE = "adaptive_top_k.json"
KIND, SCHEMA = "equipoise adaptive top-k", 1


@dataclass(frozen=True, kw_only=True)
class SavedThreshold:
    """Of one router: the smallest weights are dropped that together stay below ``threshold``."""

    experts: int
    top_k: int
    threshold: float  # a share of a token's weight where the router normalises its weights, else a weight
    sensitivity: float = math.nan  # nats per squared weight; NaN where it was not measured
    mark: float = math.nan  # of the weights that the router had (`router_mark`); NaN where nothing is to be compared

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise FieldError("threshold", "a number of 0 or more", repr(self.threshold))


@dataclass(frozen=True, kw_only=True)
class SavedTopK:
    """Router name in the model -> its threshold, and where these are from."""

    routers: dict[str, SavedThreshold]
    budget: float = math.nan  # T, in nats: threshold = sqrt(T / sensitivity); NaN for thresholds of another origin
    measured: dict[str, Any] = field(default_factory=dict)  # for people: the model, the text, what it costs


def top_k_file(path: str | Path) -> Path:
    """The file itself, or the one in a folder."""
    path = Path(path)
    return path / FILE if path.is_dir() else path


def write_top_k(path: str | Path, saved: SavedTopK) -> Path:
    """Writes it whole into a folder, or to a file that ends in .json. Raises OutputError."""
    path = Path(path)
    path = path if path.suffix == ".json" else path / FILE
    content = {"kind": KIND, "schema": SCHEMA, **encode(saved)}
    atomic_write(path, (json.dumps(_plain(content), indent=1, allow_nan=False) + "\n").encode())
    return path


def read_top_k(path: str | Path) -> SavedTopK:
    """The inverse; ``path`` is the file or its folder.

    Raises DataError where there is none, and for a file of another kind or of a later version.
    """
    path = top_k_file(path)
    expected = f"thresholds of a model's routers in {path}"
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(
            expected=expected, got="no such file", do=f"equipoise adapt MODEL writes {FILE}; pass it or its folder"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(expected=expected, got=str(error)[:120], do="run equipoise adapt again") from None
    if not isinstance(found, dict) or found.pop("kind", None) != KIND:
        raise DataError(expected=expected, got="a file of another kind", do=f"pass the {FILE} of equipoise adapt")
    if (schema := found.pop("schema", None)) != SCHEMA:
        raise DataError(expected=f"{expected}, of version {SCHEMA}", got=f"version {schema}", do="update equipoise")
    try:
        return decode(SavedTopK, found, Rules(null_is_nan=True))
    except (FieldError, TypeError) as error:
        raise DataError(expected=expected, got=str(error)[:160], do="run equipoise adapt again") from None


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: null is what was not measured, and a threshold above every weight is large."""
    match value:
        case float():
            return None if math.isnan(value) else min(value, 1e9)
        case dict():
            return {key: _plain(one) for key, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
    return value
