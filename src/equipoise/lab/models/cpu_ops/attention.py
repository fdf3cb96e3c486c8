"""Causal attention with a norm and a rotation on every query and key head, as one operator with its own gradient.

What it saves on a CPU against the same lines under autograd: norm, rotation and softmax run a few sequences at a time,
over numbers that are still in the cache; rows are multiplied with the keys before them only; four tensors are kept for
backward instead of twenty. Long sequences and other devices take torch's own kernel.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library

from ....torch_internals import softmax_gradient

__all__ = ["Positions", "causal_attention"]

# Up to this length the scores of a few sequences fit the cache. Forward + backward of 32 x 256 tokens, 4 heads of
# 32, bf16, one thread, projections included: 60 ms, and 85 by products, softmax and norms under autograd; there,
# torch's flash kernel takes twice as long as three plain products.
LONGEST = 512
ROWS = 128  # queries that are worked on together: 256 of them skip a quarter of the scores
HEADS = 32  # matrices of scores that are worked on together: 2 MiB of them in bf16


class Positions(NamedTuple):
    """Rotary tables, each [S, head_dim] in fp32, for positions 0 .. S - 1.

    >>> Positions.of(4, 2, theta=10_000.0).cos[:, 0]
    tensor([ 1.0000,  0.5403, -0.4161, -0.9900])
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, length: int, head_dim: int, *, theta: float, device: torch.device | None = None) -> Positions:
        pairs = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32)
        angles = torch.outer(torch.arange(length, device=device).float(), theta ** -(pairs / head_dim))
        angles = torch.cat([angles, angles], dim=-1)
        return cls(angles.cos(), angles.sin())


def causal_attention(
    qkv_BSHd: Tensor, q_scale_d: Tensor, k_scale_d: Tensor, positions: Positions, *, heads: int, eps: float
) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the positions up to each one's own, [B, S, heads * d].

    Every head of q and k is first divided by its root mean square, multiplied by its scale [d], and rotated: dimension
    i with dimension i + d / 2, as Hugging Face does. ``qkv_BSHd`` holds ``heads`` queries, then keys and equally many
    values, of which each serves as many neighbouring queries. Gradients for ``qkv`` and both scales; first order only.

    >>> qkv = torch.randn(2, 5, 4 + 2 + 2, 6)
    >>> causal_attention(qkv, torch.ones(6), torch.ones(6), Positions.of(5, 6, theta=1e4), heads=4, eps=1e-6).shape
    torch.Size([2, 5, 24])
    """
    if qkv_BSHd.device.type != "cpu" or qkv_BSHd.shape[1] > LONGEST:
        return _unfused(qkv_BSHd, q_scale_d, k_scale_d, positions, heads, eps)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (qkv_BSHd, q_scale_d, k_scale_d))
    out_BSHd = _forward(qkv_BSHd, q_scale_d, k_scale_d, *positions, heads, eps, differentiable)[0]
    return out_BSHd.flatten(2)


def _unfused(
    qkv_BSHd: Tensor, q_scale_d: Tensor, k_scale_d: Tensor, positions: Positions, heads: int, eps: float
) -> Tensor:
    """The same by torch's kernels and autograd."""
    groups = (qkv_BSHd.shape[2] - heads) // 2
    q, k, v = (x.transpose(1, 2) for x in qkv_BSHd.split([heads, groups, groups], dim=2))
    cos, sin = (table.to(q.dtype) for table in positions)

    def turned(x: Tensor, scale_d: Tensor) -> Tensor:
        x = F.rms_norm(x, scale_d.shape, eps=eps) * scale_d.to(x.dtype)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    q, k = turned(q, q_scale_d), turned(k, k_scale_d)
    out_BHSd = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != heads)
    return out_BHSd.transpose(1, 2).flatten(2)


# ------------------------------------------------------------------------------------------- norm and rotation


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = x.shape[-1] // 2
    return x[..., :half], x[..., half:]


def _turn(x_BSHd: Tensor, scale_d: Tensor, cos: Tensor, sin: Tensor, eps: float, out: Tensor, inverse: Tensor) -> None:
    """out [B, H, S, d] = the heads normed, scaled and rotated; inverse [B, H, S, 1] = 1 / their root mean square."""
    size, wide = x_BSHd.shape[-1], inverse.dtype
    x = torch.empty_like(out, dtype=wide).copy_(x_BSHd.transpose(1, 2))
    y = x * x
    torch.mv(y.view(-1, size), y.new_full((size,), 1 / size), out=inverse.view(-1))
    inverse.add_(eps).rsqrt_()
    first, second = _halves(scale_d)
    torch.mul(x, cos * scale_d, out=y)  # scale and rotation are one table for each of the two dimensions of a pair
    for into, other, table in zip(_halves(y), reversed(_halves(x)), _halves(sin * torch.cat([-second, first])),
                                  strict=True):  # fmt: skip
        into.addcmul_(other, table)
    out.copy_(y.mul_(inverse))


def _turn_back(
    grad: Tensor, x_BSHd: Tensor, scale_d: Tensor, cos: Tensor, sin: Tensor, inverse: Tensor, out_BSHd: Tensor
) -> Tensor:
    """Writes the gradient of the heads into ``out_BSHd`` and returns that of their scale (d,)."""
    size, wide = x_BSHd.shape[-1], inverse.dtype
    grad = grad.to(wide)
    turned = grad * cos
    for into, other, table, sign in zip(_halves(turned), reversed(_halves(grad)), reversed(_halves(sin)), (1, -1),
                                        strict=True):  # fmt: skip
        into.addcmul_(other, table, value=sign)
    normed = torch.empty_like(turned).copy_(x_BSHd.transpose(1, 2)).mul_(inverse)
    product = torch.mul(normed, turned, out=grad)
    along = torch.mv(product.view(-1, size), scale_d / size).view_as(inverse)
    turned.mul_(scale_d).addcmul_(normed, along, value=-1).mul_(inverse)
    out_BSHd.copy_(turned.transpose(1, 2))
    return product.view(-1, size).sum(dim=0)


# ------------------------------------------------------------------------------------------- attention


def _blocks(length: int) -> list[tuple[int, int]]:
    """Queries start .. stop see the keys before stop."""
    return [(start, min(start + ROWS, length)) for start in range(0, length, ROWS)]


def _scores(length: int) -> int:
    """How many of them a head has, those above the diagonal that are computed too among them."""
    return sum((stop - start) * stop for start, stop in _blocks(length))


def _parts(batch: int, heads: int) -> Iterator[slice]:
    """Sequences that are worked on together."""
    size = max(1, HEADS // heads)
    return (slice(start, min(start + size, batch)) for start in range(0, batch, size))


def _flat(x_BHSd: Tensor, heads: int) -> Tensor:
    """[B * heads, S, d]; a key or value once for each query that it serves."""
    groups = x_BHSd.shape[1]
    return (x_BHSd if groups == heads else x_BHSd.repeat_interleave(heads // groups, dim=1)).flatten(0, 1)


@library.custom_op("equipoise::attention_forward", mutates_args=(), device_types="cpu")
def _forward(
    qkv_BSHd: torch.Tensor,
    q_scale_d: torch.Tensor,
    k_scale_d: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    eps: float,
    keep: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The output [B, S, H, d], and for the gradient: q, k, v [B, ., S, d] as they are multiplied, 1 / root mean square
    of each q and k [B, ., S, 1], and the attention weights one after the other (none unless ``keep``)."""
    (batch, length, _, size), groups = qkv_BSHd.shape, (qkv_BSHd.shape[2] - heads) // 2
    out_BSHd = qkv_BSHd.new_empty(batch, length, heads, size)
    q, k, v = (qkv_BSHd.new_empty(batch, count, length, size) for count in (heads, groups, groups))
    wide = torch.promote_types(qkv_BSHd.dtype, torch.float32)
    q_inverse, k_inverse = (x.new_empty(batch, x.shape[1], length, 1, dtype=wide) for x in (q, k))
    kept = qkv_BSHd.new_empty(batch * heads * _scores(length) if keep else 0)
    above = torch.full((ROWS, ROWS), -math.inf, dtype=qkv_BSHd.dtype).triu_(1)
    factor, place = size**-0.5, 0
    for part in _parts(batch, heads):
        heads_of = qkv_BSHd[part].split([heads, groups, groups], dim=2)
        _turn(heads_of[0], q_scale_d * factor, cos, sin, eps, q[part], q_inverse[part])
        _turn(heads_of[1], k_scale_d, cos, sin, eps, k[part], k_inverse[part])
        v[part].copy_(heads_of[2].transpose(1, 2))
        q_NSd, k_NSd, v_NSd = (_flat(x[part], heads) for x in (q, k, v))
        out_NSd = torch.empty_like(q_NSd)
        for start, stop in _blocks(length):
            scores = torch.bmm(q_NSd[:, start:stop], k_NSd[:, :stop].mT)
            scores[..., start:].add_(above[: stop - start, : stop - start])
            weights = scores
            if keep:
                weights = kept[place : place + scores.numel()].view_as(scores)
                place += scores.numel()
            torch.softmax(scores, -1, out=weights)
            torch.bmm(weights, v_NSd[:, :stop], out=out_NSd[:, start:stop])
        out_BSHd[part].copy_(out_NSd.view_as(q[part]).transpose(1, 2))
    return out_BSHd, q, k, v, q_inverse, k_inverse, kept


@library.custom_op("equipoise::attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    d_out_BSHd: torch.Tensor,
    qkv_BSHd: torch.Tensor,
    q_scale_d: torch.Tensor,
    k_scale_d: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    saved: list[torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of qkv and of both scales."""
    q, k, v, q_inverse, k_inverse, kept = saved
    (batch, heads, length, size), groups = q.shape, k.shape[1]
    d_qkv_BSHd = torch.empty_like(qkv_BSHd)
    d_q_scale_d, d_k_scale_d = torch.zeros_like(q_scale_d), torch.zeros_like(k_scale_d)
    factor, place = size**-0.5, 0
    for part in _parts(batch, heads):
        q_NSd, k_NSd, v_NSd = (_flat(x[part], heads) for x in (q, k, v))
        d_out_NSd = d_out_BSHd[part].transpose(1, 2).flatten(0, 1)
        dq_NSd, dk_NSd, dv_NSd = torch.empty_like(q_NSd), torch.zeros_like(k_NSd), torch.zeros_like(v_NSd)
        for start, stop in _blocks(length):
            weights = kept[place : (place := place + len(q_NSd) * (stop - start) * stop)]
            weights = weights.view(len(q_NSd), stop - start, stop)
            d_weights = torch.bmm(d_out_NSd[:, start:stop], v_NSd[:, :stop].mT)
            d_scores = softmax_gradient(d_weights, weights, -1, weights.dtype)
            torch.bmm(d_scores, k_NSd[:, :stop], out=dq_NSd[:, start:stop])
            dk_NSd[:, :stop].baddbmm_(d_scores.mT, q_NSd[:, start:stop])
            dv_NSd[:, :stop].baddbmm_(weights.mT, d_out_NSd[:, start:stop])
        dq, dk, dv = (x.view(-1, heads, length, size) for x in (dq_NSd, dk_NSd, dv_NSd))
        if groups != heads:
            dk, dv = (x.unflatten(1, (groups, -1)).sum(dim=2) for x in (dk, dv))
        heads_of, into = (x[part].split([heads, groups, groups], dim=2) for x in (qkv_BSHd, d_qkv_BSHd))
        d_q_scale_d += _turn_back(dq, heads_of[0], q_scale_d * factor, cos, sin, q_inverse[part], into[0]) * factor
        d_k_scale_d += _turn_back(dk, heads_of[1], k_scale_d, cos, sin, k_inverse[part], into[1])
        into[2].copy_(dv.transpose(1, 2))
    return d_qkv_BSHd, d_q_scale_d, d_k_scale_d


@_forward.register_fake
def _(qkv_BSHd, _q, _k, _cos, _sin, heads, _eps, keep):
    (batch, length, _, size), groups = qkv_BSHd.shape, (qkv_BSHd.shape[2] - heads) // 2
    wide = torch.promote_types(qkv_BSHd.dtype, torch.float32)
    q, k, v = (qkv_BSHd.new_empty(batch, count, length, size) for count in (heads, groups, groups))
    q_inverse, k_inverse = (x.new_empty(batch, x.shape[1], length, 1, dtype=wide) for x in (q, k))
    kept = qkv_BSHd.new_empty(batch * heads * _scores(length) if keep else 0)
    return qkv_BSHd.new_empty(batch, length, heads, size), q, k, v, q_inverse, k_inverse, kept


@_backward.register_fake
def _(_d_out, qkv_BSHd, q_scale_d, k_scale_d, _cos, _sin, _saved):
    return tuple(torch.empty_like(x) for x in (qkv_BSHd, q_scale_d, k_scale_d))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:5], *output[1:])


def _gradient(ctx: Any, d_out_BSHd: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if d_out_BSHd is None:
        return (None,) * 8
    *inputs, q, k, v, q_inverse, k_inverse, kept = ctx.saved_tensors
    return *_backward(d_out_BSHd, *inputs, [q, k, v, q_inverse, k_inverse, kept]), *(None,) * 5


_forward.register_autograd(_gradient, setup_context=_save)
