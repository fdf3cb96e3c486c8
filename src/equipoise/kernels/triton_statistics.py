"""Triton kernels from the sums of a router's sequences to what a state keeps: one program, everything in fp64."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["fractions", "statistics"]


@triton.jit
def _maxvio(counts_E, NUM: tl.constexpr):
    mean = tl.sum(counts_E, axis=0) / NUM
    return tl.where(mean > 0.0, tl.max(counts_E, axis=0) / tl.where(mean > 0.0, mean, 1.0) - 1.0, 0.0)


@triton.jit
def statistics(
    counts_ptr, plain_ptr, probs_ptr, scalars_ptr, out_ptr, SEQUENCES, MICRO, TOP,
    NUM: tl.constexpr, WIDTH: tl.constexpr, PLAIN: tl.constexpr, TERMS: tl.constexpr, SIZE: tl.constexpr,
    TOKENS: tl.constexpr, ROUTED_TOKENS: tl.constexpr, CALLS: tl.constexpr, NONEMPTY_SEQUENCES: tl.constexpr,
    TOPK_SCORE: tl.constexpr, LSE_SQUARE: tl.constexpr, MAXVIO_SEQUENCE: tl.constexpr,
    MAXVIO_MICRO_BATCH: tl.constexpr, SEQUENCES_AT: tl.constexpr, NONEMPTY_MICRO_BATCHES: tl.constexpr,
):  # fmt: skip
    """counts, probs, [counts without bias], the scalars at their offsets, 0 for each term's value.

    SIZE numbers in all. MICRO neighbouring sequences make a micro-batch; TOP choices a token.
    """
    lane_E = tl.arange(0, WIDTH)
    expert = lane_E < NUM
    counts_E = tl.zeros([WIDTH], tl.float64)
    plain_E = tl.zeros([WIDTH], tl.float64)
    probs_E = tl.zeros([WIDTH], tl.float64)
    group_E = tl.zeros([WIDTH], tl.float64)
    zero = tl.sum(counts_E, axis=0)
    full = zero
    score = zero
    lse = zero
    sequence_maxvio = zero
    micro_maxvio = zero
    micro_batches = zero
    b = 0
    while b < SEQUENCES:
        row_E = tl.load(counts_ptr + b * NUM + lane_E, mask=expert, other=0).to(tl.float64)
        counts_E += row_E
        group_E += row_E
        probs_E += tl.load(probs_ptr + b * NUM + lane_E, mask=expert, other=0.0)
        if PLAIN:
            plain_E += tl.load(plain_ptr + b * NUM + lane_E, mask=expert, other=0).to(tl.float64)
        full += tl.where(tl.sum(row_E, axis=0) > 0.0, 1.0, 0.0)
        score += tl.load(scalars_ptr + 2 * b)
        lse += tl.load(scalars_ptr + 2 * b + 1)
        sequence_maxvio += _maxvio(row_E, NUM)
        b += 1
        ends = (b % MICRO == 0) | (b == SEQUENCES)
        micro_maxvio += tl.where(ends, _maxvio(group_E, NUM), 0.0)
        micro_batches += tl.where(ends & (tl.sum(group_E, axis=0) > 0.0), 1.0, 0.0)
        group_E = tl.where(ends, 0.0, group_E)
    tl.store(out_ptr + lane_E, counts_E, mask=expert)
    tl.store(out_ptr + NUM + lane_E, probs_E, mask=expert)
    if PLAIN:
        tl.store(out_ptr + 2 * NUM + lane_E, plain_E, mask=expert)
    routed = tl.sum(counts_E, axis=0) / TOP
    tl.store(out_ptr + TOKENS, routed)  # where a router gets only some of the tokens, these kernels are not used
    tl.store(out_ptr + ROUTED_TOKENS, routed)
    tl.store(out_ptr + CALLS, zero + 1.0)
    tl.store(out_ptr + NONEMPTY_SEQUENCES, full)
    tl.store(out_ptr + TOPK_SCORE, score)
    tl.store(out_ptr + LSE_SQUARE, lse)
    tl.store(out_ptr + MAXVIO_SEQUENCE, sequence_maxvio)
    tl.store(out_ptr + MAXVIO_MICRO_BATCH, micro_maxvio)
    tl.store(out_ptr + SEQUENCES_AT, zero + SEQUENCES)
    tl.store(out_ptr + NONEMPTY_MICRO_BATCHES, micro_batches)
    for n in tl.static_range(TERMS):
        tl.store(out_ptr + SIZE - TERMS + n, zero)


@triton.jit
def fractions(counts_ptr, probs_ptr, fraction_ptr, value_ptr, SEQUENCES, SPAN, NUM: tl.constexpr, WIDTH: tl.constexpr):
    """f of every sequence where SPAN neighbouring ones share one, and E sum over b of <f_b, p_b>."""
    lane_E = tl.arange(0, WIDTH)
    expert = lane_E < NUM
    total_E = tl.zeros([WIDTH], tl.float64)
    first = 0
    while first < SEQUENCES:
        stop = tl.minimum(first + SPAN, SEQUENCES)
        load_E = tl.zeros([WIDTH], tl.float64)
        probs_E = tl.zeros([WIDTH], tl.float64)
        b = first
        while b < stop:
            load_E += tl.load(counts_ptr + b * NUM + lane_E, mask=expert, other=0).to(tl.float64)
            probs_E += tl.load(probs_ptr + b * NUM + lane_E, mask=expert, other=0.0)
            b += 1
        f_E = load_E / tl.maximum(tl.sum(load_E, axis=0), 1.0)
        b = first
        while b < stop:
            tl.store(fraction_ptr + b * NUM + lane_E, f_E, mask=expert)
            b += 1
        total_E += f_E * probs_E
        first = stop
    tl.store(value_ptr, NUM * tl.sum(total_E, axis=0))
