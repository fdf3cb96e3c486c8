"""What an upcycling cost and kept: numbers as a file beside the model, and as a table."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import fmean
from typing import Any, Self

from ...errors import DataError
from ...report.data.formatting import number
from ...report.text.table import table, wrap
from ...storage.codec import FieldError, Rules, decode, encode, without_nan
from ...storage.files import atomic_write

__all__ = ["RESULT_NAME", "LayerResult", "Upcycled", "read_result", "render_result", "write_result"]

RESULT_NAME = "upcycle.json"
RULES = Rules(null_is_nan=True, unknown_fields=True)
OF_LAYERS = """\
Missed: squared error of a block over the square of the feed-forward's output, on held-out text; before: without \
training. First: share of the K weights that the largest holds. Experts: the fewest that keep the share asked for."""


@dataclass(frozen=True, kw_only=True)
class LayerResult:
    """One layer. What only a distillation measures is NaN, empty or 0 elsewhere; see `distillation.DistilledLayer`."""

    layer: int
    moe: bool
    seconds: float
    error_before: float = math.nan
    error: float = math.nan
    maxvio: float = math.nan
    topk_score: float = math.nan
    information: float = math.nan
    shares: list[float] = field(default_factory=list)
    top_k: int = 0  # that keeps the share of router weight asked for

    @classmethod
    def of(cls, report: Mapping[str, Any]) -> Self:
        return decode(cls, {f.name: report[f.name] for f in fields(cls) if f.name in report}, RULES)


@dataclass(frozen=True, kw_only=True)
class Upcycled:
    """The whole. Losses are held-out nats per token by domain, empty without text; ``seconds`` of all attempts."""

    method: str
    architecture: str
    experts: int
    top_k: int
    granularity: int
    noise: float
    strategy: str
    dense_parameters: int
    parameters: int
    active_parameters: int
    dense_loss: dict[str, float]
    loss: dict[str, float]
    tokens: int
    seconds: float
    layers: list[LayerResult]
    notes: list[str]


def write_result(path: Path, found: Upcycled) -> None:
    """Raises OutputError where it cannot be written."""
    atomic_write(path, (json.dumps(without_nan(encode(found)), indent=1, allow_nan=False) + "\n").encode())


def read_result(path: Path) -> Upcycled:
    """Raises DataError for a file that is missing or is none."""
    try:
        return decode(Upcycled, json.loads(path.read_bytes()), RULES)
    except (OSError, ValueError, FieldError) as error:
        raise DataError(expected=f"the result of an upcycling in {path}", got=str(error)[:120],
                        do="upcycle the model again, into a new folder") from None  # fmt: skip


def render_result(found: Upcycled) -> str:
    """Tables of at most 80 columns: before and after, each distilled layer, and what no number says."""
    dense, before, after = found.dense_parameters, _mean(found.dense_loss), _mean(found.loss)
    rows = [
        ["parameters", f"{dense:,}", f"{found.parameters:,}", f"{found.parameters / dense:.2f} x"],
        [
            "active for a token",
            f"{dense:,}",
            f"{found.active_parameters:,}",
            f"{found.active_parameters / dense:.2f} x",
        ],
    ]
    if found.loss:
        rows.append(["held-out loss (nats per token)", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}"])
        rows += [
            [f"  {name}", f"{found.dense_loss[name]:.4f}", f"{loss:.4f}", f"{loss - found.dense_loss[name]:+.4f}"]
            for name, loss in found.loss.items()
            if len(found.loss) > 1
        ]
    moe = sum(one.moe for one in found.layers)
    how = {"copy": "copies", "split": "split", "distill": f"distilled, balance {found.strategy}"}[found.method]
    sizes = f"{moe} of {len(found.layers)} layers with {found.experts} experts, top-{found.top_k}"
    parts = [table(f"{found.architecture}, {how}", ["", "dense", "MoE", ""], rows,
                   f"{sizes}; {found.seconds:,.0f} seconds.")]  # fmt: skip
    distilled = [one for one in found.layers if one.shares]
    if distilled:
        rows = [
            [str(one.layer), f"{one.error_before:.1%}", f"{one.error:.1%}", number(one.maxvio), number(one.topk_score),
             f"{one.shares[0]:.2f}", str(one.top_k), f"{one.seconds:,.0f}"]
            for one in distilled
        ]  # fmt: skip
        head = ["layer", "before", "missed", "MaxVio", "top-K score", "first", "experts", "seconds"]
        parts.append(table(f"Distilled on {found.tokens:,} tokens", head, rows, OF_LAYERS))
    return "\n\n".join([*parts, *(wrap(f"note: {note}", "  ") for note in found.notes)])


def _mean(loss: Mapping[str, float]) -> float:
    return fmean(loss.values()) if loss else math.nan
