"""The tap: the identity on the loss, whose backward runs before every router's and tells the balancer to bind."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Tapped", "tapped"]


class Tapped(Protocol):
    """What a tap asks of its balancer."""

    generation: int  # changes when a step is over or given up

    def bind(self, scale: Tensor, taken: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """Adds a micro-batch to the step; returns the pressure of every router per unit of scale."""
        ...

    def press(self, per_scale: list[Tensor], scale: Tensor, *, count: bool) -> None:
        """Writes the pressure that the routers' backward will read."""
        ...

    def end_backward(self) -> None:
        """The backward that was pressed has ended."""
        ...


def tapped(loss: Tensor, balancer: Tapped, taken: list[tuple[Tensor, Tensor]], scale: float | None) -> Tensor:
    """Returns ``loss``; ``taken`` is what forward proposed, ``scale`` replaces the gradient that arrives."""
    return _Tap.apply(loss, balancer, taken, scale)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, balancer, taken, scale):
        ctx.balancer, ctx.taken, ctx.scale = balancer, taken, scale
        ctx.bound, ctx.generation = None, None
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        balancer: Tapped = ctx.balancer
        scale = (grad if ctx.scale is None else grad.new_full((), ctx.scale)).detach()
        again = ctx.generation == balancer.generation  # a second backward of this loss: pushes again, counts nothing
        if not again:
            ctx.bound = balancer.bind(scale, ctx.taken)
            ctx.generation = balancer.generation
        balancer.press(ctx.bound, scale, count=not again)
        torch.autograd.Variable._execution_engine.queue_callback(balancer.end_backward)
        return grad, None, None, None
