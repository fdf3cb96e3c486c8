"""A comparison of fusion runs as plain text of at most 80 columns."""

from __future__ import annotations

from ...report.data.formatting import clean, clip, number, signed
from ...report.data.statistics import Difference
from ...report.text.table import table, wrap
from .strategies import MODALITIES
from .summary import Compared, StrategySummary

__all__ = ["render"]

NAME = 18  # columns of a strategy's


def render(compared: Compared) -> str:
    """The headline, losses, loads, and what auxiliary routers get right where experts choose."""
    parts = [wrap(clean(compared.headline)), _losses(compared), _loads(compared)]
    choosing = [one for one in compared.strategies if one.numbers["accuracy text"].n]
    if choosing:
        parts.append(_choices(choosing))
    parts += [wrap(f"! {clean(problem)}", "  ") for problem in compared.problems]
    return "\n\n".join(parts)


def _losses(compared: Compared) -> str:
    rows = [
        [clip(clean(one.name), NAME), str(one.runs and len(one.runs)), number(one.mean("loss text"), 3),
         _against(one.differences["text"]), number(one.mean("loss image"), 3), _against(one.differences["image"])]
        for one in compared.strategies
    ]  # fmt: skip
    note = (
        f"Nats per held-out token, causal; beside them the difference from {clean(compared.baseline)}, paired by seed, "
        "with its 95 % interval. Marks around images are in neither."
    )
    return table(
        f"Losses at step {compared.step}", ["strategy", "n", "text", "against", "image", "against"], rows, note
    )


def _loads(compared: Compared) -> str:
    rows = [
        [clip(clean(one.name), NAME), *(number(one.mean(f"maxvio {name}"), 2) for name in MODALITIES),
         number(one.mean("information"), 3), *(number(one.mean(f"experts {name}"), 2) for name in MODALITIES),
         f"{one.runs[0].header.active_parameters / 1e3:,.0f} K", f"{one.runs[0].header.parameters / 1e3:,.0f} K"]
        for one in compared.strategies
    ]  # fmt: skip
    note = (
        "MaxVio: fullest expert over the even share of the experts that are open to the modality, minus 1. nats: "
        "information between expert and modality, at most 0.693. Experts per token, as computed. Active: parameters "
        "that compute a token, routers with them; without routers they are alike."
    )
    heads = ["strategy", "MaxVio text", "image", "nats", "experts text", "image", "active", "all"]
    return table("Loads and sizes", heads, rows, note)


def _choices(choosing: list[StrategySummary]) -> str:
    rows = [
        [clip(clean(one.name), NAME), name, number(one.mean(f"chosen loss {name}"), 3),
         number(one.mean(f"loss {name}"), 3),
         *(number(100 * one.mean(f"{what} {name}"), 0) for what in ("accuracy", "precision", "recall"))]
        for one in choosing
        for name in MODALITIES
    ]  # fmt: skip
    note = (
        "Chosen: the loss where experts choose from a batch, as in training, and see tokens to come. "
        "Causal: by the auxiliary routers. They say of each token and expert whether it would be chosen: share that is "
        "right, of the pairs they let compute, of those that would be chosen."
    )
    heads = ["strategy", "tokens", "chosen", "causal", "right %", "precise %", "found %"]
    return table("Where experts choose", heads, rows, note)


def _against(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.low is None or difference.high is None:
        return signed(difference.mean, 3)
    return f"{signed(difference.mean, 3)} ±{(difference.high - difference.low) / 2:.3f}"
