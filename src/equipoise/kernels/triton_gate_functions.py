"""The gates of `functional.routing` for Triton: scores, their logarithms and slopes, NaN and infinity included."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["log_score", "score", "slope", "softplus"]

FAR_BELOW_ZERO = tl.constexpr(-40.0)  # as in functional.routing


@triton.jit
def log1p_small(e):
    """log(1 + e) for e in 0..1, to fp32's last bits: the series of 2 artanh(e / (2 + e)), whose argument is <= 1/3.

    log(1 + e) itself loses e's bits, and a GPU's approximate logarithm is worst next to 1.
    """
    s = e / (2.0 + e)
    q = s * s
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))))))
    return 2.0 * s * series


@triton.jit
def softplus(z):
    return tl.maximum(z, 0.0) + log1p_small(tl.exp(-tl.abs(z)))


@triton.jit
def log_score(z, GATE: tl.constexpr):
    if GATE == "softmax":
        return z
    elif GATE == "sigmoid":
        return tl.minimum(z, 0.0) - log1p_small(tl.exp(-tl.abs(z)))
    else:
        return 0.5 * tl.where(z < FAR_BELOW_ZERO, z, tl.log(softplus(z)))


@triton.jit
def score(z, GATE: tl.constexpr):
    """Of a gate that looks at each expert alone; softmax needs the row's sum."""
    if GATE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(-z))
    else:
        return tl.where(z < FAR_BELOW_ZERO, tl.exp(0.5 * z), tl.sqrt(softplus(z)))


@triton.jit
def slope(z, GATE: tl.constexpr):
    """d log score / dz."""
    if GATE == "softmax":
        return tl.full(z.shape, 1.0, tl.float32)
    elif GATE == "sigmoid":
        return 1.0 / (1.0 + tl.exp(z))
    else:
        return tl.where(z < FAR_BELOW_ZERO, 0.5, 0.5 / ((1.0 + tl.exp(-z)) * softplus(z)))
