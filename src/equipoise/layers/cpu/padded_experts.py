"""The experts' SwiGLU on a CPU as one operator with a hand-written gradient: sorted, padded rows, experts in blocks.

What it saves against a product per expert under autograd (or ``F.grouped_mm``), by measurement:

- padded row counts (`padded_size`): oneDNN compiles a kernel per new shape, and loads are new at every step;
- one batched product for adjacent experts with few rows each (`even_sizes`): a product of oneDNN's costs 20 us to call;
- experts in blocks of 4096 rows or more: few elementwise passes, over rows that are still in the cache;
- rows gathered block by block, sums over K as one gather: no (N, D) tensor is copied, sorted back or scattered;
- kept buffers: the pages of a fresh 32 MiB cost 26 ms, writing them 3 ms.

It is a custom operator because its loop over experts follows the data, which no compiler can trace; as one node it also
works under ``torch.compile(fullgraph=True)`` and can be named in a selective checkpoint policy
(``torch.ops.equipoise.experts_forward``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from ...functional.permute import equal_runs, gather_sum, max_rows, pad_rows
from ...kernels import grouped_mm, has_grouped_mm
from .huge_pages import LARGE, fresh
from .swiglu import scratch, swiglu, swiglu_gradient

__all__ = ["padded_experts"]

BLOCK_ROWS = 4096


class _Block(NamedTuple):
    """Consecutive experts that are worked on together: their rows, and which of them share a product."""

    rows: slice
    experts: slice
    runs: list[int]  # experts of each product
    sizes: list[int]  # rows of each product
    ends_E: Tensor | None  # of all experts' rows, where F.grouped_mm serves: one block, a product for each expert

    def multiply(self, left_RA: Tensor, right_EAB: Tensor, out_RB: Tensor) -> Tensor:
        """left @ right[e] over each expert's share of the block's rows; in ``out`` if it can be."""
        if self.ends_E is not None:
            return grouped_mm(left_RA, right_EAB, self.ends_E)
        shares = left_RA.split(self.sizes), right_EAB[self.experts].split(self.runs), out_RB.split(self.sizes)
        for run, rows, left, right, out in zip(self.runs, self.sizes, *shares, strict=True):
            if run > 1:
                torch.bmm(left.unflatten(0, (run, -1)), right, out=out.unflatten(0, (run, -1)))
            elif rows:
                torch.mm(left, right[0], out=out)
        return out_RB

    def outer(self, left_RA: Tensor, right_RB: Tensor, out_EAB: Tensor) -> Tensor:
        """left.T @ right[e] over each expert's share, zero for an expert without rows; in ``out`` if it can be."""
        if self.ends_E is not None:
            return grouped_mm(left_RA.t(), right_RB, self.ends_E)
        shares = left_RA.split(self.sizes), right_RB.split(self.sizes), out_EAB[self.experts].split(self.runs)
        for run, rows, left, right, out in zip(self.runs, self.sizes, *shares, strict=True):
            if not rows:
                out.zero_()
            elif run > 1:
                torch.bmm(left.unflatten(0, (run, -1)).mT, right.unflatten(0, (run, -1)), out=out)
            else:
                torch.mm(left.t(), right, out=out[0])
        return out_EAB

    def gather(self, name: str, x_TD: Tensor, tokens_R: Tensor) -> Tensor:
        tokens = tokens_R[self.rows]
        return torch.index_select(x_TD, 0, tokens, out=scratch.take(name, x_TD, len(tokens), x_TD.shape[1]))


def _blocks(sizes_E: Tensor, x_TD: Tensor, hidden: int) -> list[_Block]:
    sizes, blocks = sizes_E.tolist(), []
    start = stop = first = 0
    runs: list[int] = []
    shares: list[int] = []
    for expert, run in equal_runs(sizes):
        runs.append(run)
        shares.append(run * sizes[expert])
        stop += shares[-1]
        if stop - start >= BLOCK_ROWS or expert + run == len(sizes):
            blocks.append(_Block(slice(start, stop), slice(first, expert + run), runs, shares, None))
            start, first, runs, shares = stop, expert + run, [], []
    size, dim = x_TD.dtype.itemsize, x_TD.shape[1]
    grouped = has_grouped_mm()  # not in every PyTorch that this library runs on
    grouped &= size <= 4 and dim * size % 16 == hidden * size % 16 == 0  # what it demands
    grouped &= len(sizes) * hidden * dim * size < LARGE  # else its fresh gradients cost more than a loop in Python
    if grouped and len(blocks) == 1 and len(blocks[0].runs) == len(sizes) and stop:
        return [blocks[0]._replace(ends_E=sizes_E.cumsum(0, dtype=torch.int32))]
    return blocks


def _layout(x_TD: Tensor, num_pairs: int, num_experts: int, hidden: int) -> dict[str, Any]:
    """How `pad_rows` lays the rows out. A product has 3 D H additions a row on average, and a price of its own.

    Measured: 20 us in bfloat16, where oneDNN does 200 GFLOP/s. In float32 a BLAS, which compiles nothing and so needs
    no padding, makes 3 us of it, and shared products win only where experts are tiny.
    """
    pad = x_TD.dtype.itemsize == 2
    call = (2_000_000 if pad else 40_000) // (3 * x_TD.shape[1] * hidden)
    return {"pad": pad, "call": min(call, 16 + num_pairs // num_experts)}


def _beside_idle(rows: Tensor, all_RD: Tensor) -> Tensor:
    """``all_RD`` with these rows first: a product makes none of the idle ones behind them."""
    all_RD[: len(rows)] = rows
    return all_RD


@library.custom_op("equipoise::experts_forward", mutates_args=(), device_types="cpu")
def _forward(
    x_TD: torch.Tensor,
    gate_up_EFD: torch.Tensor,
    down_EDH: torch.Tensor,
    expert_ids_TK: torch.Tensor,
    weights_TK: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output, and what the gradient needs: hidden rows (R, F = 2H), their tokens, rows_TK, and the experts' sizes
    and counts (2, E). R does not follow the loads: a compiler plans with it, and a checkpoint refuses a recompute whose
    tensors have other shapes, where top-k flipped.

    Dropped pairs read one idle row of zeros."""
    num_experts, width, dim = gate_up_EFD.shape
    layout = _layout(x_TD, expert_ids_TK.numel(), num_experts, width // 2)
    pairs_R, rows_TK, *sizes, drops = pad_rows(expert_ids_TK, num_experts, **layout)
    tokens_R = pairs_R // expert_ids_TK.shape[1]
    hidden_RF = fresh(x_TD, len(pairs_R), width)
    out_RD = scratch.take("out", x_TD, len(pairs_R), dim)
    for block in _blocks(sizes[0], x_TD, width // 2):
        x = block.gather("x", x_TD, tokens_R)
        hidden = block.multiply(x, gate_up_EFD.mT, hidden_RF[block.rows])
        out = block.multiply(swiglu(hidden), down_EDH.mT, out_RD[block.rows])
        if block.ends_E is not None:
            hidden_RF[block.rows], out_RD = hidden, _beside_idle(out, out_RD) if drops else out
    weights_TK = weights_TK.to(x_TD.dtype)
    if drops:
        out_RD[-1] = 0
        weights_TK = weights_TK.masked_fill(expert_ids_TK == num_experts, 0)
    return gather_sum(out_RD, rows_TK, weights_TK), hidden_RF, tokens_R, rows_TK, torch.stack(sizes)


@library.custom_op("equipoise::experts_backward", mutates_args=(), device_types="cpu")
def _backward(
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    gate_up_EFD: torch.Tensor,
    down_EDH: torch.Tensor,
    weights_TK: torch.Tensor,
    hidden_RF: torch.Tensor,
    tokens_R: torch.Tensor,
    rows_TK: torch.Tensor,
    sizes_2E: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of x, gate_up, down and of the routing weights (these in float32 or wider)."""
    sizes_E, counts_E = sizes_2E.unbind()
    drops = sum(counts_E.tolist()) < rows_TK.numel()
    d_gate_up_EFD, d_down_EDH = fresh(x_TD, *gate_up_EFD.shape), fresh(x_TD, *down_EDH.shape)
    dx_RD = scratch.take("out", x_TD, len(tokens_R), x_TD.shape[1])
    d_weights_R = x_TD.new_empty(len(tokens_R), dtype=torch.promote_types(x_TD.dtype, torch.float32))
    weights_R1 = x_TD.new_zeros(len(tokens_R), 1)
    weights_R1.view(-1)[rows_TK] = weights_TK.to(x_TD.dtype)
    for block in _blocks(sizes_E, x_TD, down_EDH.shape[2]):
        x, dy = block.gather("x", x_TD, tokens_R), block.gather("dy", dy_TD, tokens_R)
        hidden = hidden_RF[block.rows]
        d_act = block.multiply(dy, down_EDH, scratch.take("d_act", x, len(x), down_EDH.shape[2]))
        act, d_hidden = swiglu_gradient(hidden, d_act, weights_R1[block.rows], d_weights_R[block.rows])
        d_down = block.outer(dy, act, d_down_EDH)
        d_gate_up = block.outer(d_hidden, x, d_gate_up_EFD)
        dx = block.multiply(d_hidden, gate_up_EFD, dx_RD[block.rows])
        if block.ends_E is not None:
            d_down_EDH, d_gate_up_EFD, dx_RD = d_down, d_gate_up, _beside_idle(dx, dx_RD) if drops else dx
    if drops:
        dx_RD[-1], d_weights_R[-1] = 0, 0
    idle = ((sizes_E > 0) & (counts_E == 0)).nonzero().flatten()
    if len(idle):  # their rows are a neighbour's tokens: weight 0 makes zeros of them, but not of a NaN
        d_gate_up_EFD.index_fill_(0, idle, 0)
        d_down_EDH.index_fill_(0, idle, 0)
    return gather_sum(dx_RD, rows_TK), d_gate_up_EFD, d_down_EDH, d_weights_R.take(rows_TK)


@_forward.register_fake
def _(x_TD, gate_up_EFD, _down, expert_ids_TK, _weights):
    num_experts, width, _ = gate_up_EFD.shape
    tokens, top_k = expert_ids_TK.shape
    rows = max_rows(tokens * top_k, num_experts, **_layout(x_TD, tokens * top_k, num_experts, width // 2))
    integers = expert_ids_TK.new_empty
    y_TD, hidden_RF = torch.empty_like(x_TD), x_TD.new_empty(rows, width)
    return y_TD, hidden_RF, integers(rows), integers(tokens, top_k), integers(2, num_experts)


@_backward.register_fake
def _(_dy, x_TD, gate_up_EFD, down_EDH, _weights, _hidden, _tokens, rows_TK, _sizes):
    d_weights_TK = rows_TK.new_empty(rows_TK.shape, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    return torch.empty_like(x_TD), torch.empty_like(gate_up_EFD), torch.empty_like(down_EDH), d_weights_TK


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, gate_up_EFD, down_EDH, _, weights_TK = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # no zeros for the saved rows
    ctx.save_for_backward(x_TD, gate_up_EFD, down_EDH, weights_TK, *output[1:])
    ctx.weights_dtype = weights_TK.dtype


def _gradient(ctx: Any, dy_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 5
    dx_TD, d_gate_up_EFD, d_down_EDH, d_weights_TK = _backward(dy_TD.contiguous(), *ctx.saved_tensors)
    return dx_TD, d_gate_up_EFD, d_down_EDH, None, d_weights_TK.to(ctx.weights_dtype)


_forward.register_autograd(_gradient, setup_context=_save)


def padded_experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """y_t = the sum over k of w_tk · down_e(silu(gate_e(x_t)) · up_e(x_t)), e = ids_tk; gate rows before up rows.

    ``x`` and both parameters share one dtype; ``weights_TK`` may be wider. Gradients for all four; first order only.
    A choice whose id is E is none: its weight is not looked at. Raises InputError for an id outside 0..E.

    >>> x, gate_up, down = torch.ones(2, 1), torch.ones(3, 2, 1), torch.tensor([[[1.0]], [[2.0]], [[4.0]]])
    >>> padded_experts(x, gate_up, down, torch.tensor([[0], [2]]), torch.ones(2, 1)).flatten()  # silu(1) = 0.7311
    tensor([0.7311, 2.9242])
    """
    return _forward(x_TD.contiguous(), gate_up_EFD, down_EDH, expert_ids_TK, weights_TK)[0]
