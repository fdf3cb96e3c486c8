"""What must hold around an optimizer step; each mistake here would train something else and show nowhere."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import StateError
from .policies.losses import AuxLoss, ZLoss
from .policies.switch import Timed
from .pressure import Layer

__all__ = ["check_before_step", "check_tokens", "saw_nothing"]


def saw_nothing(layers: Sequence[Layer], statistics: Sequence[Tensor]) -> bool:
    """Whether no router ran. Only asked on the CPU: a GPU is not made to wait for the answer."""
    if any(one.device.type != "cpu" for one in statistics):
        return False
    return not any(bool(one[layer.meter.plan.at("calls")] > 0) for layer, one in zip(layers, statistics, strict=True))


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


def check_tokens(layer: Layer, statistics: Tensor, declared: float | None, passes: int) -> None:
    """Raises StateError when routers saw another number of tokens than ``begin_step`` announced.

    Args:
        statistics: of the whole step, all ranks.
        passes: micro-batches of the step, all ranks; a layer may run several times in each.

    Only on the CPU: a GPU is not made to wait.
    """
    if declared is None or statistics.device.type != "cpu":
        return
    plan = layer.meter.plan
    calls = float(statistics[plan.at("calls")]) / passes
    if calls < 1:  # a router that some passes do not reach (of pictures, in text) cannot tell
        return
    tokens = float(statistics[plan.at("tokens")]) / calls
    if not torch.isclose(torch.tensor(tokens), torch.tensor(float(declared)), rtol=1e-6):
        raise StateError(
            expected=f"{declared:g} router tokens in the step, as begin_step said",
            got=f"{tokens:g}",
            do="declare the valid tokens of all ranks and micro-batches: the balance gradient was divided by them",
        )
