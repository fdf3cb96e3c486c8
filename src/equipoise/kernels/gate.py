"""The gate's product in fp32 from bf16 tokens, by products of bf16 matrices that are added up in fp32.

A product of two bf16 numbers is exact in fp32, and three bf16 numbers hold an fp32 number. So with tokens in bf16 the
tensor cores give the logits that an fp32 product gives, at sixteen times its rate, and no fp32 copy of the tokens is
made (at T = 16384, D = 2048 that copy alone is 134 MB, written and read again). It stays a product of matrices from
cuBLAS: what could be fused into it is an eighth of what it reads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, library

from .availability import load, usable

__all__ = ["gate_fits", "gate_logits"]


def gate_fits(x_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether `gate_logits` takes them: bf16 tokens where the kernels run, a weight in bf16 or fp32, T not 0.

    >>> gate_fits(torch.zeros(1, 8), torch.zeros(4, 8))
    False
    """
    kinds = x_TD.dtype == torch.bfloat16 and weight_ED.dtype in (torch.bfloat16, torch.float32)
    return kinds and usable(x_TD) and len(x_TD) > 0


def gate_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """x @ weight.T in fp32: (T, E); gradients for both, first order only.

    The gradient of a weight in fp32 is as exact as an fp32 product; what is rounded to bf16 in the end (the gradient of
    the tokens, of a bf16 weight) is computed from 16 bits of each factor.
    """
    return _Gate.apply(x_TD, weight_ED)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _forward(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        needs_x, needs_weight = ctx.needs_input_grad
        dx_TD, dw_ED = _backward(grads[0], x_TD, weight_ED, needs_x, needs_weight)
        return dx_TD if needs_x else None, dw_ED if needs_weight else None


@library.custom_op("equipoise::gate_forward", mutates_args=())
def _forward(x_TD: torch.Tensor, weight_ED: torch.Tensor) -> torch.Tensor:
    if weight_ED.dtype == torch.bfloat16:
        return _wide_product(x_TD, weight_ED.t())
    parts_PED = _split(weight_ED, 3, beside=False)
    return _wide_product(x_TD, parts_PED.t()).view(len(x_TD), 3, -1).sum(dim=1)


@_forward.register_fake
def _(x_TD, weight_ED):
    return x_TD.new_empty(x_TD.shape[0], weight_ED.shape[0], dtype=torch.float32)


@library.custom_op("equipoise::gate_backward", mutates_args=())
def _backward(
    dz_TE: torch.Tensor, x_TD: torch.Tensor, weight_ED: torch.Tensor, needs_x: bool, needs_weight: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    num_experts, exact = weight_ED.shape[0], weight_ED.dtype == torch.float32
    parts = 3 if exact else 2
    dz_TPE = _split(dz_TE, parts, beside=True)
    dx_TD, dw_ED = x_TD.new_empty(0), weight_ED.new_empty(0)
    if needs_x:  # (high + low) · weight in one product; a weight in fp32: high · low as well
        rights, lefts = [weight_ED, weight_ED], [dz_TPE[:, : 2 * num_experts]]
        if exact:
            high_ED, low_ED = _split(weight_ED, 2, beside=False).chunk(2)
            rights, lefts = [high_ED, high_ED, low_ED], [*lefts, dz_TPE[:, :num_experts]]
        dx_TD = (lefts[0] if len(lefts) == 1 else torch.cat(lefts, dim=1)) @ torch.cat(rights)
    if needs_weight:
        dw_ED = _wide_product(dz_TPE.t(), x_TD).view(parts, num_experts, -1).sum(dim=0).to(weight_ED.dtype)
    return dx_TD, dw_ED


@_backward.register_fake
def _(_dz, x_TD, weight_ED, needs_x, needs_weight):
    dx_TD = torch.empty_like(x_TD) if needs_x else x_TD.new_empty(0)
    return dx_TD, torch.empty_like(weight_ED) if needs_weight else weight_ED.new_empty(0)


def _wide_product(left_AB: Tensor, right_BC: Tensor) -> Tensor:
    """A product of bf16 matrices, added up and given in fp32."""
    if left_AB.is_cuda:
        return torch.mm(left_AB, right_BC, out_dtype=torch.float32)
    return left_AB.float() @ right_BC.float()


def _split(x_RC: Tensor, parts: int, *, beside: bool) -> Tensor:
    """fp32 as a sum of bf16 numbers: the parts beside each other, (R, parts C), or below, (parts R, C)."""
    rows, columns = x_RC.shape
    x_RC = x_RC.float().contiguous()
    shape = (rows, parts * columns) if beside else (parts * rows, columns)
    out = x_RC.new_empty(shape, dtype=torch.bfloat16)
    block = min(1 << (columns - 1).bit_length(), 1024)
    tile = max(1, 1024 // block)
    part_stride = columns if beside else rows * columns
    load("triton_split").split[(-(-rows // tile), -(-columns // block))](
        x_RC, out, rows, columns, shape[1], part_stride, PARTS=parts, TILE=tile, BLOCK=block
    )
    return out
