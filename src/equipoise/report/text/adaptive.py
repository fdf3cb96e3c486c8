"""The result of `equipoise adapt` as plain text of at most 80 columns: the findings, the curve, layers, caches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ...storage.adaptive_record import Adaptive, CacheRow, CurvePoint
from ..data.formatting import clean, clip, listed, number, plural, signed
from .table import table, wrap

__all__ = ["CACHE_NOTE", "CURVE_NOTE", "LAYER_NOTE", "cache_table", "curve_table", "layer_table", "rank_correlation",
           "render_adaptive", "short_names", "words_of"]  # fmt: skip

NAME = 18  # the widest a layer's name gets
ONE = 1e6  # a budget or a threshold from here on leaves one expert a token
CURVE_NOTE = (
    "T: an expert is dropped where it costs less than so many nats by its layer's sensitivity. One weight: the same "
    "share dropped by one threshold for all layers. Increases are of held-out loss, in nats per token."
)
LAYER_NOTE = (
    "Sensitivity: nats per squared weight. One expert: the increase of the loss where this layer alone uses one expert "
    "a token. Foreseen: share of the used experts that the gate chooses for the input of the layer before; in brackets "
    "by guessing the busiest every time."
)
CACHE_NOTE = (
    "A simulation on recorded choices, least recently used out first, a cache for each layer; nothing is timed. Loads "
    "are per token and layer; waits are those that the layer before does not foresee. Fitted sizes were fitted to "
    "other text."
)
Cells = tuple[list[str], list[list[str]]]


def render_adaptive(found: Adaptive) -> str:
    """The findings in sentences, then a table for each question."""
    parts = [wrap(clean(words_of(found)))]
    parts.append(table("Fewer experts against held-out loss", *curve_table(found), CURVE_NOTE, gaps=(3, 2, 1)))
    parts.append(table("Layers", *layer_table(found), LAYER_NOTE, gaps=(3, 2, 1)))
    if found.caches:
        parts.append(table("Caches of experts, simulated", *cache_table(found), CACHE_NOTE, gaps=(3, 2, 1)))
    parts += [wrap(clean(f"note: {problem}")) for problem in found.problems]
    return "\n\n".join(parts)


def words_of(found: Adaptive) -> str:
    """What was found, in sentences."""
    facts, point, start = found.facts, found.saved, found.curve[0]
    sizes = listed(sorted({f"{one.experts} experts top-{one.top_k}" for one in found.layers}))
    text = f"{facts.measured_tokens:,} tokens, losses of {facts.held_tokens:,} others"
    loss = f"{signed(point.loss - start.loss, 4)} nats ({start.loss:.4f} before)"
    control = f"{signed(point.control_loss - start.loss, 4)} at {point.control_fewer:.1%} fewer"
    budget = f"At T = {point.budget:.3g} nats" if point.budget < ONE else "With one expert for each of them"
    layers = plural(len(found.layers), "MoE layer")
    said = [
        f"{facts.model} ({facts.family}): {layers} of {sizes}. Sensitivities from {text}.",
        f"{budget} tokens use {point.fewer:.1%} fewer experts; held-out loss {loss}.",
        f"With one threshold for all layers: {control}.",
    ]
    known = [one for one in found.layers if math.isfinite(one.alone_measured)]
    if len(known) > 2:
        order = rank_correlation([one.alone for one in known], [one.alone_measured for one in known])
        said.append(f"One expert in a layer alone: rank correlation of predicted and measured {order:.2f}.")
    return " ".join(said)


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's, of values without ties.

    >>> rank_correlation([1.0, 2.0, 3.0], [10.0, 30.0, 20.0])
    0.5
    """
    ranks = [{place: rank for rank, place in enumerate(sorted(range(len(one)), key=one.__getitem__))} for one in (a, b)]
    squares = sum((ranks[0][i] - ranks[1][i]) ** 2 for i in range(len(a)))
    return 1 - 6 * squares / (len(a) * (len(a) ** 2 - 1))


def short_names(names: Sequence[str]) -> list[str]:
    """Without the parts that all begin and end with.

    >>> short_names(["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"])
    ['0', '1']
    >>> short_names(["gate"]), short_names(["model.layers.1.mlp.gate"])
    (['gate'], ['1'])
    """
    parts = [name.split(".") for name in names]
    if len(parts) < 2:
        return [next((one for one in part if one.isdigit()), name) for part, name in zip(parts, names, strict=True)]
    shortest = min(map(len, parts))
    begin = next((i for i in range(shortest) if len({part[i] for part in parts}) > 1), 0)
    end = next((i for i in range(shortest - begin) if len({part[-1 - i] for part in parts}) > 1), 0)
    return [".".join(part[begin : len(part) - end]) for part in parts]


def curve_table(found: Adaptive) -> Cells:
    """Header and rows: a line per budget."""
    start = found.curve[0]
    points: Sequence[tuple[CurvePoint, str]] = [
        (point, "knee" if place == found.knee else "") for place, point in enumerate(found.curve)
    ]
    if found.saved not in found.curve:
        points = sorted([*points, (found.saved, "saved")], key=lambda one: one[0].fewer)
    rows = [
        [
            f"{point.budget:.3g}" if point.budget < ONE else "all",
            f"{point.fewer:.1%}",
            f"{point.loss:.4f}",
            signed(point.loss - start.loss, 4),
            f"{point.control_fewer:.1%}",
            signed(point.control_loss - start.loss, 4),
            mark,
        ]
        for point, mark in points
    ]
    return ["T", "fewer", "loss", "increase", "one weight", "increase", ""], rows


def layer_table(found: Adaptive) -> Cells:
    """Header and rows: a line per router."""
    measured = any(math.isfinite(one.alone_measured) for one in found.layers)
    header = [
        "layer",
        "sensitivity",
        "one expert",
        *(["measured"] if measured else []),
        "threshold",
        "used",
        "foreseen",
    ]
    rows = [
        [
            clip(clean(name), NAME),
            f"{one.sensitivity:.3g}",
            signed(one.alone, 4),
            *([signed(one.alone_measured, 4)] if measured else []),
            number(one.threshold) if one.threshold < ONE else "all",
            f"{one.used:.2f} of {one.top_k}",
            f"{_share(one.predicted)} ({_share(one.most_used)})",
        ]
        for name, one in zip(short_names([one.name for one in found.layers]), found.layers, strict=True)
    ]
    return header, rows


def cache_table(found: Adaptive) -> Cells:
    """Header and rows: a line per memory, choice and allocation."""
    rows = [
        [
            f"{row.kept:.0%}",
            "adaptive" if row.adaptive else "all K",
            "fitted" if row.fitted else "equal",
            _sizes(row),
            f"{row.hits:.1%}",
            f"{row.loads:.3f}",
            f"{row.waits:.3f}",
        ]
        for row in found.caches
    ]
    return ["memory", "experts", "sizes", "of a layer", "hits", "loads", "waits"], rows


def _share(value: float) -> str:
    return f"{value:.0%}" if math.isfinite(value) else "–"


def _sizes(row: CacheRow) -> str:
    low, high = min(row.sizes), max(row.sizes)
    return f"{low}" if low == high else f"{low} to {high}"
