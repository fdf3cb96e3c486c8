"""The Triton kernel that writes fp32 numbers as sums of bf16 numbers."""

# pyright: reportGeneralTypeIssues=false
# (a kernel's loops and calls are the compiler's, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["split"]


@triton.jit
def split(
    x_ptr, out_ptr, ROWS, COLUMNS, ROW_STRIDE, PART_STRIDE, PARTS: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """out[part] = the bf16 nearest to what the parts before leave of x: three of them hold all 24 bits of it."""
    row = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < ROWS) & (column < COLUMNS)
    left = tl.load(x_ptr + row * COLUMNS + column, mask=inside, other=0.0)
    for part in tl.static_range(PARTS):
        nearest = left.to(tl.bfloat16)
        tl.store(out_ptr + row * ROW_STRIDE + part * PART_STRIDE + column, nearest, mask=inside)
        left -= nearest.to(tl.float32)
