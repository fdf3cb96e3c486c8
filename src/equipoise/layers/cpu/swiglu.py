"""What lies between the products of experts on a CPU: SwiGLU of hidden rows and its gradient, in kept buffers."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

from .huge_pages import fresh

__all__ = ["scratch", "swiglu", "swiglu_gradient"]

_silu = torch.ops.aten.silu.out
_silu_backward = torch.ops.aten.silu_backward.grad_input


class _Scratch(threading.local):
    """Buffers that every call in a thread uses again; each grows to the largest ever asked for."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """An uninitialised tensor of the type of ``like``, yours until the same name is taken again."""
        numel, key = math.prod(shape), (name, like.dtype)
        if key not in self.kept or self.kept[key].numel() < numel:
            with torch.inference_mode(False):  # or a later training step could not write to it
                self.kept[key] = fresh(like, numel)
        return self.kept[key][:numel].view(shape)


scratch = _Scratch()


def swiglu(hidden_RF: Tensor) -> Tensor:
    """silu(gate) up of rows [gate, up]: (R, 2H) -> (R, H), in the buffer "act".

    >>> swiglu(torch.tensor([[1.0, 2.0]]))  # silu(1) = 0.7311
    tensor([[1.4621]])
    """
    gate, up = hidden_RF.chunk(2, dim=1)
    return _silu(gate, out=scratch.take("act", hidden_RF, *gate.shape)).mul_(up)


def swiglu_gradient(
    hidden_RF: Tensor, d_act_RH: Tensor, weights_R1: Tensor, d_weights_R: Tensor
) -> tuple[Tensor, Tensor]:
    """(silu(gate) up w again, the gradient of hidden), in buffers; ``d_act_RH`` is spent, ``d_weights_R`` written.

    A row of weight 0, padding, adds nothing anywhere.

    >>> d_weights = torch.empty(1)
    >>> swiglu_gradient(torch.tensor([[0.0, 2.0]]), torch.ones(1, 1), torch.full((1, 1), 3.0), d_weights)
    (tensor([[0.]]), tensor([[3., 0.]]))
    """
    gate, up = hidden_RF.chunk(2, dim=1)
    act, silu = (scratch.take(name, hidden_RF, *gate.shape) for name in ("act", "silu"))
    d_hidden = scratch.take("d_hidden", hidden_RF, *hidden_RF.shape)
    d_gate, d_up = d_hidden.chunk(2, dim=1)
    torch.mul(_silu(gate, out=silu), up, out=act)
    product = torch.mul(d_act_RH, act, out=d_gate)  # d_gate is free until the last line
    torch.sum(product, dim=1, dtype=d_weights_R.dtype, out=d_weights_R)
    act.mul_(weights_R1)
    d_act_RH.mul_(weights_R1)
    torch.mul(d_act_RH, silu, out=d_up)
    _silu_backward(d_act_RH.mul_(up), gate, grad_input=d_gate)
    return act, d_hidden
