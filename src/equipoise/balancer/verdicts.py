"""Whether a step may be committed: the step's sum is looked at for what guards could not look at before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import sent
from .faults import Expected, Faults, verdict
from .reconcile import Row
from .reduction import Sheet
from .step_tokens import Declared

__all__ = ["judge"]


def judge(
    faults: Faults, sheets: Sequence[Sheet], sums: Sequence[Tensor], declared: Declared, data_ranks: int, step: int
) -> Tensor | bool:
    """As `Faults.settle`, from the sums of the step: those of every sheet, and the tail behind them.

    Args:
        data_ranks: how many ranks hold each layer.
    """
    *rows, tail = sums
    passes: Tensor | float = 0.0
    if declared.tokens is not None:  # of all ranks together, or a stage without routers would see another number
        passes = tail[4] / tail[3].clamp(min=1) * data_ranks
    flags, names, expected = [], [], []
    for sheet, summed in zip(sheets, rows, strict=True):
        plan = sheet.plan
        said = [declared.of_router(name) for name in sheet.names]
        tokens: Tensor | float | None = said[0]
        if len(set(said)) > 1:
            tokens = sent([float(one or 0) for one in said], summed.device)
        probs_LE = summed[:, plan.num_experts : 2 * plan.num_experts]
        flags.append(
            verdict(
                probs_LE,
                summed[:, Row.UNPUSHED],
                summed[:, Row.DOCUMENTS],
                summed[:, plan.at("tokens")],
                summed[:, plan.at("calls")],
                Expected(tokens, passes),
            )
        )
        names += sheet.names
        expected += [float(one or 0) for one in said]
    return faults.settle(flags[0] if len(flags) == 1 else torch.cat(flags), tail, step, names, expected)
