"""Experts of unlike widths on a CPU as one operator with a hand-written gradient, as `padded_experts`, one by one.

Their weights lie one after the other along the width. No two experts can share a product, so each has its own, and the
rows of one are what is still in the cache between its products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ...functional.permute import gather_sum, max_rows, pad_rows
from .huge_pages import fresh
from .swiglu import scratch, swiglu, swiglu_gradient

__all__ = ["uneven_experts"]


class _Expert(NamedTuple):
    """Where one expert has its rows, its width in the weights, and its hidden rows in a flat buffer."""

    rows: slice
    width: slice  # of down; that of gate and up is twice as long and begins twice as far
    hidden: slice

    @property
    def gate_up(self) -> slice:
        return slice(2 * self.width.start, 2 * self.width.stop)

    def gather(self, name: str, x_TD: Tensor, tokens_R: Tensor) -> Tensor:
        tokens = tokens_R[self.rows]
        return torch.index_select(x_TD, 0, tokens, out=scratch.take(name, x_TD, len(tokens), x_TD.shape[1]))

    def hidden_of(self, hidden: Tensor) -> Tensor:
        """(rows, 2H), a view."""
        return hidden[self.hidden].view(self.rows.stop - self.rows.start, -1)


def _experts(sizes: Sequence[int], widths: Sequence[int]) -> Iterator[_Expert]:
    """Those that have rows."""
    rows, columns = (pairwise(accumulate(numbers, initial=0)) for numbers in (sizes, widths))
    start = 0
    for (first, last), (left, right) in zip(rows, columns, strict=True):
        if last > first:
            stop = start + (last - first) * 2 * (right - left)
            yield _Expert(slice(first, last), slice(left, right), slice(start, stop))
            start = stop


def _pads(x_TD: Tensor) -> bool:
    """oneDNN compiles a kernel for each shape of a low-precision product, a BLAS none: see `padded_experts`."""
    return x_TD.dtype.itemsize == 2


@library.custom_op("equipoise::uneven_experts_forward", mutates_args=(), device_types="cpu")
def _forward(
    x_TD: torch.Tensor,
    gate_up_FD: torch.Tensor,
    down_HD: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what the gradient needs: all hidden rows in one buffer as long as the widest expert would need
    it, their tokens (R,), rows_TK, and the experts' rows (E,). Nothing is as long as the loads are: see
    `padded_experts`."""
    num_experts = len(widths)
    pairs_R, rows_TK, sizes_E, _, drops = pad_rows(expert_ids_TK, num_experts, pad=_pads(x_TD))
    tokens_R, dtype = pairs_R // expert_ids_TK.shape[1], x_TD.dtype
    hidden = fresh(x_TD, len(pairs_R) * 2 * max(widths))
    out_RD = scratch.take("out", x_TD, len(pairs_R), x_TD.shape[1])
    for one in _experts(sizes_E.tolist(), widths):
        x, hidden_RF = one.gather("x", x_TD, tokens_R), one.hidden_of(hidden)
        torch.mm(x, gate_up_FD[one.gate_up].t(), out=hidden_RF)
        torch.mm(swiglu(hidden_RF), down_HD[one.width], out=out_RD[one.rows])
    weights_TK = weights_TK.to(dtype)
    if drops:  # these choices read one idle row of zeros
        out_RD[-1] = 0
        weights_TK = weights_TK.masked_fill(expert_ids_TK == num_experts, 0)
    return gather_sum(out_RD, rows_TK, weights_TK), hidden, tokens_R, rows_TK, sizes_E.clone()


@library.custom_op("equipoise::uneven_experts_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gate_up_FD: torch.Tensor,
    down_HD: torch.Tensor,
    weights_TK: torch.Tensor,
    hidden: torch.Tensor,
    tokens_R: torch.Tensor,
    rows_TK: torch.Tensor,
    sizes_E: torch.Tensor,
    widths: Sequence[int],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate_up, down and of the routing weights (these in float32 or wider)."""
    sizes = sizes_E.tolist()
    d_gate_up_FD, d_down_HD = fresh(x_TD, *gate_up_FD.shape), fresh(x_TD, *down_HD.shape)
    for size, (left, right) in zip(sizes, pairwise(accumulate(widths, initial=0)), strict=True):
        if not size:
            d_gate_up_FD[2 * left : 2 * right].zero_()
            d_down_HD[left:right].zero_()
    dx_RD = scratch.take("out", x_TD, len(tokens_R), x_TD.shape[1])
    d_weights_R = x_TD.new_empty(len(tokens_R), dtype=torch.promote_types(x_TD.dtype, torch.float32))
    weights_R1 = x_TD.new_zeros(len(tokens_R), 1)
    weights_R1.view(-1)[rows_TK] = weights_TK.to(x_TD.dtype)
    for one in _experts(sizes, widths):
        x, dy = one.gather("x", x_TD, tokens_R), one.gather("dy", dy_TD, tokens_R)
        down_HD_e = down_HD[one.width]
        d_act = torch.mm(dy, down_HD_e.t(), out=scratch.take("d_act", x, len(x), len(down_HD_e)))
        act, d_hidden = swiglu_gradient(one.hidden_of(hidden), d_act, weights_R1[one.rows], d_weights_R[one.rows])
        torch.mm(act.t(), dy, out=d_down_HD[one.width])
        torch.mm(d_hidden.t(), x, out=d_gate_up_FD[one.gate_up])
        torch.mm(d_hidden, gate_up_FD[one.gate_up], out=dx_RD[one.rows])
    if sum(sizes) < len(tokens_R):  # the last row is idle: no expert's, or of choices that are none
        dx_RD[-1], d_weights_R[-1] = 0, 0
    return gather_sum(dx_RD, rows_TK), d_gate_up_FD, d_down_HD, d_weights_R.take(rows_TK)


@_forward.register_fake
def _(x_TD, _gate_up, _down, expert_ids_TK, _weights, widths):
    tokens, top_k = expert_ids_TK.shape
    rows = max_rows(tokens * top_k, len(widths), pad=_pads(x_TD))
    integers = expert_ids_TK.new_empty
    hidden = x_TD.new_empty(rows * 2 * max(widths))
    return torch.empty_like(x_TD), hidden, integers(rows), integers(tokens, top_k), integers(len(widths))


@_backward.register_fake
def _(_dy, x_TD, gate_up_FD, down_HD, _weights, _hidden, _tokens, rows_TK, _sizes, _widths):
    d_weights_TK = rows_TK.new_empty(rows_TK.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    return torch.empty_like(x_TD), torch.empty_like(gate_up_FD), torch.empty_like(down_HD), d_weights_TK


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, gate_up_FD, down_HD, _, weights_TK, widths = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the saved rows
    ctx.save_for_backward(x_TD, gate_up_FD, down_HD, weights_TK, *output[1:])
    ctx.weights_dtype, ctx.widths = weights_TK.dtype, widths


def _gradient(ctx: Any, dy_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 6
    dx_TD, d_gate_up_FD, d_down_HD, d_weights_TK = _backward(dy_TD.contiguous(), *ctx.saved_tensors, ctx.widths)
    return dx_TD, d_gate_up_FD, d_down_HD, None, d_weights_TK.to(ctx.weights_dtype), None


_forward.register_autograd(_gradient, setup_context=_save)


def uneven_experts(
    x_TD: Tensor,
    gate_up_FD: Tensor,
    down_HD: Tensor,
    expert_ids_TK: Tensor,
    weights_TK: Tensor,
    widths: Sequence[int],
) -> Tensor:
    """`padded_experts` for experts of these widths: y_t = the sum over k of w_tk · down_e(silu(gate_e) · up_e).

    Args:
        gate_up_FD: (2 * sum of widths, D); of each expert in turn the rows of its gate, then those of up.
        down_HD: (sum of widths, D); of each expert in turn its down projection, transposed.

    Raises InputError for an id outside 0..E; E is no expert.

    >>> x, gate_up, down = torch.ones(2, 1), torch.ones(6, 1), torch.ones(3, 1)
    >>> uneven_experts(x, gate_up, down, torch.tensor([[0], [1]]), torch.ones(2, 1), [1, 2]).flatten()
    tensor([0.7311, 1.4621])
    """
    return _forward(x_TD.contiguous(), gate_up_FD, down_HD, expert_ids_TK, weights_TK, list(widths))[0]
