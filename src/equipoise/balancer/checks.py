"""What must hold around an optimizer step; each mistake here would train something else and show nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..devices import to_device
from ..errors import StateError
from ..policies.schedule import Schedule
from .declared_step import DeclaredStep
from .faults import FORWARDS, NOT_EMPTY, Expected, Faults, fault_flags
from .layer_group import Layer, LayerGroup
from .reduction import StepTable

__all__ = ["check_before_step", "check_step_sums", "no_router_ran"]


def no_router_ran(groups: Sequence[LayerGroup], statistics: Sequence[Tensor]) -> bool:
    """Whether no router ran; waits for the device."""
    return not any(
        bool(group.spec.scalar(one_LS, "calls").any()) for group, one_LS in zip(groups, statistics, strict=True)
    )


def check_before_step(
    layers: Sequence[Layer],
    schedule: Schedule,
    step: int,
    micro_steps: Sequence[int],
    declared: int | None,
) -> None:
    """Raises StateError for a step that the balancer did not see, or saw otherwise than it was declared.

    Args:
        micro_steps: how many micro-batches were tapped, for each part of the model.
        declared: how many ``begin_step`` announced.
    """
    pushes = schedule.has_gradient(step)
    counted = any(layer.balance_state.grad_accumulator.grad is not None for layer in layers)
    learns = any(layer.trainable for layer in layers)
    if not any(micro_steps) and (not schedule or (pushes and learns)):
        raise StateError(
            expected="loss = balancer.tap(loss) before backward in every step",
            got="an optimizer step whose backward passed no tap"
            if counted
            else "an optimizer step without a tapped backward of the balanced layers in training mode",
            do="tap the loss, put the model in train() mode, or balancer.remove() to train without balance",
        )
    if not any(micro_steps) and not counted:
        raise StateError(
            expected="a backward through the routers in training mode before the step",
            got="none",
            do="call model.train(), or balancer.remove() to train without balance",
        )
    for part in {layer.part for layer in layers}:
        if declared is not None and declared != micro_steps[part]:
            raise StateError(
                expected=f"{declared} micro-batches, as begin_step said",
                got=f"{micro_steps[part]} tapped",
                do="declare what the step has: the balance gradient was scaled by it",
            )


def check_step_sums(
    faults: Faults,
    tables: Sequence[StepTable],
    sums: Sequence[Tensor],
    declared: DeclaredStep,
    data_ranks: int,
    step: int,
) -> Tensor | bool:
    """As `Faults.settle`, from the sums of the step: those of every table, and the tail behind them.

    Args:
        data_ranks: how many ranks hold each layer.
    """
    *rows, tail = sums
    passes: Tensor | float = 0.0
    if declared.tokens is not None:  # of all ranks together, or a stage without routers would see another number
        passes = tail[FORWARDS] / tail[NOT_EMPTY].clamp(min=1) * data_ranks
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
