"""The tap: the identity on the loss, whose backward runs before every router's and tells the balancer to prepare it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..autograd.router_state import ForwardStats
from ..errors import InputError, described
from ..torch_internals import queue_after_backward
from .layer_group import MicroBatchCoefficients

__all__ = ["Coefficients", "TappedForward", "check_loss", "tap_loss"]

Coefficients = Callable[[], list[MicroBatchCoefficients]]  # one per group; waits for a sum over ranks, once


class TappedForward(NamedTuple):
    """What the forward of one part of the model measured, that a tapped loss is made of."""

    part: int
    taken: list[ForwardStats]  # one per group of that part


def check_loss(loss: Any, scale: Any) -> None:
    """Raises InputError for what is no loss: with a ``scale`` it may have any shape."""
    if not isinstance(loss, Tensor) or (scale is None and loss.numel() != 1):
        raise InputError(
            expected="a scalar loss",
            got=f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else described(loss),
            do="tap the mean loss, a tensor, or pass scale= with a stage's activations",
        )


class Tapped(Protocol):
    """What a tap asks of its balancer."""

    generation: int  # changes when a step is over or given up

    def start_backward(self, scale: Tensor, forward: TappedForward) -> Coefficients:
        """Adds a micro-batch to the step; returns what gives the coefficients of its backward."""
        ...

    def write_coefficients(
        self, forward: TappedForward, coefficients: Coefficients, scale: Tensor, *, count: bool
    ) -> None:
        """Sees to it that the coefficients are there before the routers' backward reads them."""
        ...

    def end_backward(self) -> None:
        """That backward has ended."""
        ...


def tap_loss(
    loss: Tensor,
    balancer: Tapped,
    forward: TappedForward,
    scale: float | Callable[[], Tensor | float] | None,
    tokens: Tensor | float | None = None,
) -> Tensor:
    """Returns ``loss``; ``scale`` replaces the gradient that arrives, and that of a sum is multiplied by ``tokens``."""
    return _TapLoss.apply(loss, balancer, forward, scale, tokens)


class _TapLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, balancer, forward, scale, tokens):
        ctx.balancer, ctx.forward_taken, ctx.scale, ctx.tokens = balancer, forward, scale, tokens
        ctx.coefficients, ctx.generation = None, None
        return loss.clone()  # not a view: zero-bubble schedules detach losses and activations in place

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        balancer: Tapped = ctx.balancer
        scale = grad.detach() if ctx.scale is None else _said(ctx.scale, grad.device)
        if ctx.tokens is not None:
            scale = scale * (ctx.tokens + (ctx.tokens == 0))  # without a label engines divide by 1
        again = ctx.generation == balancer.generation  # a second backward of this loss: its gradient, but no count
        if not again:
            ctx.coefficients = balancer.start_backward(scale, ctx.forward_taken)
            ctx.generation = balancer.generation
        balancer.write_coefficients(ctx.forward_taken, ctx.coefficients, scale, count=not again)
        queue_after_backward(balancer.end_backward)
        return grad, None, None, None, None


def _said(scale: float | Callable[[], Tensor | float], device: torch.device) -> Tensor:
    """In fp64: activations that a stage sends on are bf16, and 1/3 in bf16 is off by 0.2 %."""
    said = scale() if callable(scale) else scale
    if isinstance(said, Tensor):
        return said.detach().to(device, torch.float64).reshape(())
    return torch.full((), said, dtype=torch.float64, device=device)  # no copy that a GPU is waited for
