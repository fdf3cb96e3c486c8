"""The experts of a layer on a GPU: grouped products, and fused kernels for all that lies between them.

Counted for N = T K rows of width D, hidden width H: the products take 6 N D H operations forward and 12 backward.
Around them forward moves 2 N D (tokens to rows, rows to tokens) + 3 N H elements, backward 3 N D + 6 N H and T D a few
times. Of size N only the products with gate and up, (N, 2H), are kept for backward: rows are copied from the tokens
again, for 2 % of the layer's time and N D elements less memory.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from .availability import load, usable

__all__ = [
    "Rows",
    "add_rows",
    "copy_rows",
    "experts_fit",
    "fused_experts",
    "grouped_mm",
    "has_grouped_mm",
    "sort_pairs",
    "swiglu",
    "swiglu_gradient",
]

BLOCK_PAIRS = 128  # pairs that one program ranks, each against each


class Rows(NamedTuple):
    """`functional.permute.ExpertOrder`, made without a sort: by counting, in blocks."""

    order_N: Tensor
    rows_TK: Tensor
    offsets: Tensor


def experts_fit(x_TD: Tensor) -> bool:
    """Whether `fused_experts` takes these tokens: where the kernels run, in a dtype that has grouped products.

    >>> experts_fit(torch.zeros(1, 8).double())
    False
    """
    return usable(x_TD) and x_TD.dtype in (torch.bfloat16, torch.float16, torch.float32)


def has_grouped_mm() -> bool:
    """Whether this PyTorch has ``F.grouped_mm``: 2.10 and later do, 2.9 does not.

    >>> has_grouped_mm() == hasattr(torch.nn.functional, "grouped_mm")
    True
    """
    return hasattr(F, "grouped_mm")


def grouped_mm(left: Tensor, right: Tensor, ends_E: Tensor) -> Tensor:
    """``F.grouped_mm``, and without it a matrix product per expert, which waits for the GPU to read ``ends_E``.

    Left (N, A) and right (E, A, B) give (N, B): each expert's rows times its matrix. Left (A, N) and right (N, B) give
    (E, A, B): a matrix of each expert, zero for one without rows. ``ends_E`` (int32) says where each expert's rows end.
    Rows behind the last end belong to no expert: here they are zero, from ``F.grouped_mm`` they are undefined.

    >>> grouped_mm(torch.ones(3, 8), torch.ones(2, 8, 8), torch.tensor([1, 3], dtype=torch.int32)).shape
    torch.Size([3, 8])
    """
    if has_grouped_mm():
        return F.grouped_mm(left, right, offs=ends_E)
    sizes = [stop - start for start, stop in pairwise([0, *ends_E.tolist()])]
    if right.dim() == 2:
        sizes.append(len(right) - sum(sizes))
        shares = zip(left.split(sizes, dim=1)[:-1], right.split(sizes)[:-1], strict=True)
        return torch.stack([a @ b for a, b in shares])
    sizes.append(len(left) - sum(sizes))
    # unbind, because the gradient of right[e] is a zero tensor of the size of all experts, for each of them
    shares = zip(left.split(sizes)[:-1], right.unbind(), strict=True)
    return torch.cat([*(a @ b for a, b in shares), left.new_zeros(sizes[-1], right.shape[2])])


@library.custom_op("equipoise::sort_pairs", mutates_args=())
def _sort(expert_ids_TK: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids_TK = expert_ids_TK.contiguous()
    pairs = ids_TK.numel()
    rows_TK, order_N = torch.empty_like(ids_TK, dtype=torch.int64), ids_TK.new_empty(pairs, dtype=torch.int64)
    if not pairs:
        return order_N, rows_TK, ids_TK.new_zeros(num_experts + 1, dtype=torch.int32)
    blocks = -(-pairs // BLOCK_PAIRS)
    table = ids_TK.new_empty((num_experts + 1) * blocks + 1, dtype=torch.int32)
    bins = _power(num_experts + 2)  # one for ids that are none, one for what lies behind the last pair
    load("triton_experts").count_pairs[(blocks,)](ids_TK, table, pairs, NUM=num_experts, BINS=bins, BLOCK=BLOCK_PAIRS)
    starts = table.cumsum(0, dtype=torch.int32)
    load("triton_experts").place_pairs[(blocks,)](ids_TK, starts, order_N, rows_TK, pairs, num_experts, BLOCK_PAIRS, 32)
    return order_N, rows_TK, starts[: num_experts * blocks + 1 : blocks].clone()


@_sort.register_fake
def _(expert_ids_TK, num_experts):
    integers = expert_ids_TK.new_empty
    order_N = integers(expert_ids_TK.numel(), dtype=torch.int64)
    rows_TK = integers(expert_ids_TK.shape, dtype=torch.int64)
    return order_N, rows_TK, integers(num_experts + 1, dtype=torch.int32)


def sort_pairs(expert_ids_TK: Tensor, num_experts: int) -> Rows:
    """The pairs sorted by expert, ties in order, as `functional.permute.sort_by_expert` gives them; offsets are int32.

    Nothing is read on the host. Pairs whose id is outside 0..E-1 stand behind all others.
    """
    return Rows(*_sort(expert_ids_TK, num_experts))


@library.custom_op("equipoise::copy_rows", mutates_args=())
def copy_rows(x_TD: torch.Tensor, rows_TK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """Each token in its K rows: (T, D) -> (T K, D); those behind the last end are not written. The adjoint of
    `add_rows`."""
    (tokens, top_k), dim = rows_TK.shape, x_TD.shape[1]
    out_ND = x_TD.new_empty(tokens * top_k, dim)
    if out_ND.numel():
        block = min(_power(dim), 2048)
        grid = (tokens, -(-dim // block))
        last = len(ends_E) - 1
        load("triton_experts").copy_rows[grid](x_TD.contiguous(), rows_TK, ends_E, out_ND, dim, last, top_k, block)
    return out_ND


@copy_rows.register_fake
def _(x_TD, rows_TK, _ends):
    return x_TD.new_empty(rows_TK.numel(), x_TD.shape[1])


@library.custom_op("equipoise::add_rows", mutates_args=())
def add_rows(rows_ND: torch.Tensor, rows_TK: torch.Tensor, ends_E: torch.Tensor) -> torch.Tensor:
    """The sum of each token's K rows, in fp32 and rounded once, without those behind the last end: (T K, D) -> (T, D).
    The adjoint of `copy_rows`."""
    (tokens, top_k), dim = rows_TK.shape, rows_ND.shape[1]
    out_TD = rows_ND.new_empty(tokens, dim)
    if out_TD.numel():
        block = min(_power(dim), 2048)
        grid = (tokens, -(-dim // block))
        last = len(ends_E) - 1
        load("triton_experts").add_rows[grid](rows_ND.contiguous(), rows_TK, ends_E, out_TD, dim, last, top_k, block)
    return out_TD


@add_rows.register_fake
def _(rows_ND, rows_TK, _ends):
    return rows_ND.new_empty(rows_TK.shape[0], rows_ND.shape[1])


@library.custom_op("equipoise::swiglu", mutates_args=())
def swiglu(
    hidden_NF: torch.Tensor, order_N: torch.Tensor, weights_TK: torch.Tensor, ends_E: torch.Tensor
) -> torch.Tensor:
    """silu(gate) up w: (N, 2H) -> (N, H), each row with the weight of its pair, in fp32 and rounded once."""
    rows, hidden = hidden_NF.shape[0], hidden_NF.shape[1] // 2
    act_NH = hidden_NF.new_empty(rows, hidden)
    if act_NH.numel():
        block, tile = _tile(hidden)
        load("triton_experts").swiglu[(-(-rows // tile), -(-hidden // block))](
            hidden_NF.contiguous(), order_N, weights_TK.contiguous(), ends_E,
            act_NH, hidden, len(ends_E) - 1, tile, block,
        )  # fmt: skip
    return act_NH


@swiglu.register_fake
def _(hidden_NF, _order, _weights, _ends):
    return hidden_NF.new_empty(hidden_NF.shape[0], hidden_NF.shape[1] // 2)


@library.custom_op("equipoise::swiglu_gradient", mutates_args=())
def swiglu_gradient(
    hidden_NF: torch.Tensor,
    d_act_NH: torch.Tensor,
    order_N: torch.Tensor,
    weights_TK: torch.Tensor,
    ends_E: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(`swiglu`'s output again, gradient of hidden, gradient of the weights in fp32)."""
    rows, hidden = d_act_NH.shape
    act_NH, d_hidden_NF = torch.empty_like(d_act_NH), torch.empty_like(hidden_NF)
    d_weights_TK = torch.empty_like(weights_TK, dtype=torch.float32)
    if act_NH.numel():
        block, tile = _tile(hidden)
        load("triton_experts").swiglu_gradient[(-(-rows // tile),)](
            hidden_NF.contiguous(), d_act_NH.contiguous(), order_N, weights_TK.contiguous(), ends_E,
            act_NH, d_hidden_NF, d_weights_TK, rows, hidden, len(ends_E) - 1, tile, block, -(-hidden // block),
        )  # fmt: skip
    return act_NH, d_hidden_NF, d_weights_TK


@swiglu_gradient.register_fake
def _(hidden_NF, d_act_NH, _order, weights_TK, _ends):
    d_weights_TK = torch.empty_like(weights_TK, dtype=torch.float32)
    return torch.empty_like(d_act_NH), torch.empty_like(hidden_NF), d_weights_TK


def _tile(hidden: int) -> tuple[int, int]:
    """(columns, rows) of a program's tile: columns that divide the width where they may be 128 or more."""
    divisor = min(hidden & -hidden, 1024)
    columns = divisor if divisor >= 128 else min(_power(hidden), 1024)
    return columns, max(1, 2048 // columns)


def _power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << (n - 1).bit_length()


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, gate_up_EFD: Tensor, down_EDH: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        order_N, rows_TK, offsets = sort_pairs(ids_TK, len(gate_up_EFD))
        ends_E = offsets[1:]
        hidden_NF = grouped_mm(copy_rows(x_TD, rows_TK, ends_E), gate_up_EFD.mT, ends_E)
        out_ND = grouped_mm(swiglu(hidden_NF, order_N, weights_TK, ends_E), down_EDH.mT, ends_E)
        ctx.save_for_backward(x_TD, gate_up_EFD, down_EDH, weights_TK, hidden_NF, order_N, rows_TK, ends_E)
        return add_rows(out_ND, rows_TK, ends_E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, gate_up_EFD, down_EDH, weights_TK, hidden_NF, order_N, rows_TK, ends_E = ctx.saved_tensors
        needs_x, needs_gate_up, needs_down, _, needs_weights = ctx.needs_input_grad
        dy_ND = copy_rows(grads[0], rows_TK, ends_E)
        d_act_NH = grouped_mm(dy_ND, down_EDH, ends_E)
        act_NH, d_hidden_NF, d_weights_TK = swiglu_gradient(hidden_NF, d_act_NH, order_N, weights_TK, ends_E)
        dx_TD = d_gate_up_EFD = d_down_EDH = None
        if needs_down:
            d_down_EDH = grouped_mm(dy_ND.mT, act_NH, ends_E)
        del dy_ND, d_act_NH, act_NH  # or they would lie beside the rows of x
        if needs_gate_up:
            d_gate_up_EFD = grouped_mm(d_hidden_NF.mT, copy_rows(x_TD, rows_TK, ends_E), ends_E)
        if needs_x:
            dx_TD = add_rows(grouped_mm(d_hidden_NF, gate_up_EFD, ends_E), rows_TK, ends_E)
        return dx_TD, d_gate_up_EFD, d_down_EDH, None, d_weights_TK.to(weights_TK.dtype) if needs_weights else None


def fused_experts(
    x_TD: Tensor, gate_up_EFD: Tensor, down_EDH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """y_t = the sum over k of w_tk · down_e(silu(gate_e(x_t)) · up_e(x_t)), e = ids_tk; gate rows before up rows.

    ``x`` and both parameters share one dtype; ``weights_TK`` may be wider. Gradients for all four; first order only.
    A choice whose id is E is none: where the experts' rows end is read by the kernels, and not on the host.
    ``F.grouped_mm`` waits for the GPU unless the dtype is bf16 on compute capability 9.0 or 10.0 (torch 2.9 to 2.13).
    """
    return _Experts.apply(x_TD, gate_up_EFD, down_EDH, expert_ids_TK, weights_TK)
