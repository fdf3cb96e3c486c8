"""What must hold around an optimizer step; each mistake here would train something else and show nowhere."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from .errors import StateError
from .meter import Plan
from .policies.losses import AuxLoss, ZLoss
from .policies.switch import Timed
from .pressure import Bank, Layer

__all__ = ["check_before_step", "check_tokens", "saw_nothing"]


def saw_nothing(banks: Sequence[Bank], statistics: Sequence[Tensor]) -> bool:
    """Whether no router ran. Only asked on the CPU: a GPU is not made to wait for the answer."""
    if any(one_LS.device.type != "cpu" for one_LS in statistics):
        return False
    return not any(bool(one_LS[:, bank.plan.at("calls")].any()) for bank, one_LS in zip(banks, statistics, strict=True))


def check_before_step(
    layers: Sequence[Layer], timeline: Sequence[Timed], step: int, micro_steps: Sequence[int], declared: int | None
) -> None:
    """Raises StateError for a step that the balancer did not see, or saw otherwise than it was declared.

    Args:
        micro_steps: how many micro-batches were tapped, for each part of the model.
        declared: how many ``begin_step`` announced.
    """
    pushes = any(isinstance(t.policy, AuxLoss | ZLoss) and t.active(step) for t in timeline)
    counted = any(layer.meter.leaf.grad is not None for layer in layers)
    if not any(micro_steps) and pushes and any(layer.trainable for layer in layers):
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


def check_tokens(plan: Plan, sums: Tensor, declared: float | None, passes: int) -> None:
    """Raises StateError when routers saw another number of tokens than ``begin_step`` announced.

    Args:
        sums: of the whole step, all ranks, for layers of one plan: (n, at least plan.size).
        passes: micro-batches of the step, all ranks; a layer may run several times in each.

    Only on the CPU: a GPU is not made to wait.
    """
    if declared is None or sums.device.type != "cpu":
        return
    for calls, total in sums[:, [plan.at("calls"), plan.at("tokens")]].tolist():
        if calls < passes:  # a router that some passes do not reach (of pictures, in text) cannot tell
            continue
        tokens = total * passes / calls
        if not math.isclose(tokens, declared, rel_tol=1e-6):
            raise StateError(
                expected=f"{declared:g} router tokens in the step, as begin_step said",
                got=f"{tokens:g}",
                do="declare the valid tokens of all ranks and micro-batches: the balance gradient was divided by them",
            )
