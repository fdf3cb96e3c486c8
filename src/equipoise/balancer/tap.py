"""The tap: the identity on the loss, whose backward runs before every router's and tells the balancer to bind."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..autograd.router_state import Taken
from .layer_group import Bound

__all__ = ["MicroBatch", "Tapped", "tapped"]


class MicroBatch(NamedTuple):
    """What one forward of one part of the model proposed."""

    part: int
    taken: list[Taken]  # one per bank of that part


class Tapped(Protocol):
    """What a tap asks of its balancer."""

    generation: int  # changes when a step is over or given up

    def bind(self, scale: Tensor, micro_batch: MicroBatch) -> list[Bound]:
        """Adds a micro-batch to the step; returns what its backward will read at the routers of that part."""
        ...

    def press(self, part: int, bound: list[Bound], scale: Tensor, *, count: bool) -> None:
        """Writes the pressure that the routers' backward will read."""
        ...

    def end_backward(self) -> None:
        """The backward that was pressed has ended."""
        ...


def tapped(
    loss: Tensor,
    balancer: Tapped,
    micro_batch: MicroBatch,
    scale: float | None,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """Returns ``loss``; ``scale`` replaces the gradient that arrives, and that of a sum is multiplied by ``tokens``."""
    return _Tap.apply(loss, balancer, micro_batch, scale, tokens)


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, balancer, micro_batch, scale, tokens):
        ctx.balancer, ctx.micro_batch, ctx.scale, ctx.tokens = balancer, micro_batch, scale, tokens
        ctx.bound, ctx.generation = None, None
        return loss.clone()  # not a view: zero-bubble schedules detach losses and activations in place

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        balancer: Tapped = ctx.balancer
        scale = (grad if ctx.scale is None else grad.new_full((), ctx.scale)).detach()
        if ctx.tokens is not None:
            scale = scale * ctx.tokens
        again = ctx.generation == balancer.generation  # a second backward of this loss: pushes again, counts nothing
        if not again:
            ctx.bound = balancer.bind(scale, ctx.micro_batch)
            ctx.generation = balancer.generation
        balancer.press(ctx.micro_batch.part, ctx.bound, scale, count=not again)
        torch.autograd.Variable._execution_engine.queue_callback(balancer.end_backward)
        return grad, None, None, None, None
