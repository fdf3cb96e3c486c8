"""Whether a step may be committed: the step's sum is looked at for what guards could not look at before."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import to_device
from .faults import Expected, Faults, fault_flags
from .reduction import StepTable
from .step_tokens import StepTokens

__all__ = ["check_step_sums"]


def check_step_sums(
    faults: Faults,
    tables: Sequence[StepTable],
    sums: Sequence[Tensor],
    declared: StepTokens,
    data_ranks: int,
    step: int,
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
    for table, summed in zip(tables, rows, strict=True):
        spec = table.spec
        said = [declared.of_router(name) for name in table.names]
        tokens: Tensor | float | None = said[0]
        if len(set(said)) > 1:
            tokens = to_device([float(one or 0) for one in said], summed.device)
        probs_LE = spec.probs(summed)
        flags.append(
            fault_flags(
                probs_LE,
                spec.step_column(summed, "missing_gradient"),
                spec.step_column(summed, "bad_documents"),
                spec.scalar(summed, "tokens"),
                spec.scalar(summed, "calls"),
                Expected(tokens, passes),
            )
        )
        names += table.names
        expected += [float(one or 0) for one in said]
    return faults.settle(flags[0] if len(flags) == 1 else torch.cat(flags), tail, step, names, expected)
