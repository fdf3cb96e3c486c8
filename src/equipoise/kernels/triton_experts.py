"""The Triton kernels around the products of experts: sort pairs, copy rows, add rows up, SwiGLU and its gradient.

A *pair* is one (token, choice), a *row* its place among all pairs sorted by expert, as in `functional.permute`. Each
output is written once, in a fixed order: no atomics, so a repeat gives the same bits. Rows from ``ends[LAST]`` on are
of no expert: nothing is read there or written, but for a gradient of 0 for their weights.
"""

# pyright: reportGeneralTypeIssues=false
# (a kernel's loops and calls are the compiler's, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_rows", "copy_rows", "count_pairs", "place_pairs", "swiglu", "swiglu_gradient"]


@triton.jit
def _experts_of(ids_ptr, pair_P, PAIRS, NUM: tl.constexpr):
    """The expert of each pair; NUM for an id that is none, so that such pairs stand behind all others."""
    id_P = tl.load(ids_ptr + pair_P, mask=pair_P < PAIRS, other=NUM).to(tl.int32)
    return tl.where((id_P >= 0) & (id_P < NUM), id_P, NUM)


@triton.jit
def count_pairs(ids_ptr, table_ptr, PAIRS, NUM: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """table[1 + e * blocks + b] = pairs of expert e in block b; their running sum is where each block's rows begin."""
    block = tl.program_id(0)
    pair_P = block * BLOCK + tl.arange(0, BLOCK)
    id_P = tl.where(pair_P < PAIRS, _experts_of(ids_ptr, pair_P, PAIRS, NUM), BINS - 1)
    bin_E = tl.arange(0, BINS)
    count_E = tl.histogram(id_P, BINS)
    tl.store(table_ptr + 1 + bin_E * tl.num_programs(0) + block, count_E, mask=bin_E <= NUM)
    tl.store(table_ptr, 0, mask=block == 0)


@triton.jit
def place_pairs(
    ids_ptr, start_ptr, order_ptr, rows_ptr, PAIRS, NUM: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr
):
    """The row of each pair: where its expert's rows of this block begin, and how many pairs of it stand before."""
    block = tl.program_id(0)
    place_P = tl.arange(0, BLOCK)
    pair_P = block * BLOCK + place_P
    id_P = _experts_of(ids_ptr, pair_P, PAIRS, NUM)
    before_P = tl.zeros([BLOCK], tl.int32)
    for chunk in tl.static_range(BLOCK // CHUNK):
        place_C = chunk * CHUNK + tl.arange(0, CHUNK)
        id_C = _experts_of(ids_ptr, block * BLOCK + place_C, PAIRS, NUM)
        same = (id_P[:, None] == id_C[None, :]) & (place_C[None, :] < place_P[:, None])
        before_P += tl.sum(same.to(tl.int32), axis=1)
    row_P = tl.load(start_ptr + id_P * tl.num_programs(0) + block, mask=pair_P < PAIRS, other=0) + before_P
    tl.store(rows_ptr + pair_P, row_P.to(tl.int64), mask=pair_P < PAIRS)
    tl.store(order_ptr + row_P, pair_P.to(tl.int64), mask=pair_P < PAIRS)


@triton.jit
def copy_rows(x_ptr, rows_ptr, ends_ptr, out_ptr, DIM, LAST, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """out[rows[t, k]] = x[t] for all k: a token is read once."""
    end = tl.load(ends_ptr + LAST)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_D = tl.load(x_ptr + token * DIM + d, mask=d < DIM)
    for k in tl.static_range(TOP):
        row = tl.load(rows_ptr + token * TOP + k)
        tl.store(out_ptr + row * DIM + d, x_D, mask=(d < DIM) & (row < end))


@triton.jit
def add_rows(rows_in_ptr, rows_ptr, ends_ptr, out_ptr, DIM, LAST, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """out[t] = the sum over k of in[rows[t, k]], in fp32, rounded once."""
    end = tl.load(ends_ptr + LAST)
    token = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sum_D = tl.zeros([BLOCK], tl.float32)
    for k in tl.static_range(TOP):
        row = tl.load(rows_ptr + token * TOP + k)
        sum_D += tl.load(rows_in_ptr + row * DIM + d, mask=(d < DIM) & (row < end), other=0.0).to(tl.float32)
    tl.store(out_ptr + token * DIM + d, sum_D.to(out_ptr.dtype.element_ty), mask=d < DIM)


@triton.jit
def swiglu(
    hidden_ptr, order_ptr, weights_ptr, ends_ptr, out_ptr, HIDDEN, LAST, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """out = silu(gate) up w, in fp32, rounded once; hidden = [gate, up] of each row, w the weight of its pair."""
    row_R = tl.program_id(0) * TILE + tl.arange(0, TILE)
    there = row_R < tl.load(ends_ptr + LAST)
    w_R = tl.load(weights_ptr + tl.load(order_ptr + row_R, mask=there, other=0), mask=there, other=0.0).to(tl.float32)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = there[:, None] & (h < HIDDEN)[None, :]
    at = row_R.to(tl.int64)[:, None] * (2 * HIDDEN) + h[None, :]
    gate = tl.load(hidden_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + at + HIDDEN, mask=inside, other=0.0).to(tl.float32)
    act = gate * (1.0 / (1.0 + tl.exp(-gate))) * up * w_R[:, None]
    tl.store(out_ptr + row_R.to(tl.int64)[:, None] * HIDDEN + h[None, :], act.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_gradient(
    hidden_ptr, d_act_ptr, order_ptr, weights_ptr, ends_ptr, act_ptr, d_hidden_ptr, d_weights_ptr, ROWS, HIDDEN, LAST,
    TILE: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """From d_act, the gradient of silu(gate) up w: that product again, and the gradients of hidden and of w."""
    row_R = tl.program_id(0) * TILE + tl.arange(0, TILE)
    a_pair, there = row_R < ROWS, row_R < tl.load(ends_ptr + LAST)
    pair_R = tl.load(order_ptr + row_R, mask=a_pair, other=0)
    w_R1 = tl.load(weights_ptr + pair_R, mask=there, other=0.0).to(tl.float32)[:, None]
    d_weights = tl.zeros([TILE, BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        h = step * BLOCK + tl.arange(0, BLOCK)
        inside = there[:, None] & (h < HIDDEN)[None, :]
        narrow = row_R.to(tl.int64)[:, None] * HIDDEN + h[None, :]
        wide = row_R.to(tl.int64)[:, None] * (2 * HIDDEN) + h[None, :]
        gate = tl.load(hidden_ptr + wide, mask=inside, other=0.0).to(tl.float32)
        up = tl.load(hidden_ptr + wide + HIDDEN, mask=inside, other=0.0).to(tl.float32)
        d_act = tl.load(d_act_ptr + narrow, mask=inside, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigma
        d_weights += d_act * silu * up
        d_gate = d_act * w_R1 * up * (sigma * (1.0 + gate * (1.0 - sigma)))
        element = d_hidden_ptr.dtype.element_ty
        tl.store(act_ptr + narrow, (silu * up * w_R1).to(element), mask=inside)
        tl.store(d_hidden_ptr + wide, d_gate.to(element), mask=inside)
        tl.store(d_hidden_ptr + wide + HIDDEN, (d_act * w_R1 * silu).to(element), mask=inside)
    tl.store(d_weights_ptr + pair_R, tl.sum(d_weights, axis=1), mask=a_pair)
