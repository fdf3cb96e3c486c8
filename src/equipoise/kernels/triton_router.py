"""The router's Triton kernels: one pass forward, one small sum over its blocks, one pass backward.

A program works on a tile of TOKENS tokens of one sequence times all experts. Sums over tokens leave it as one row per
tile and are added up in a fixed order: no floating-point atomics, so a repeat gives the same bits.
Twins of plain PyTorch: `forward` of `functional.routing.choose`, `backward` with `_push` and `_z_push` of
`autograd.closed_form.logit_gradient`.
"""

# pyright: reportGeneralTypeIssues=false
# (a kernel's loops and calls are the compiler's, not Python's)

from __future__ import annotations

import triton
import triton.language as tl

from .triton_gate_functions import log_score, score, slope

__all__ = ["backward", "forward", "sum_tiles"]

GONE = tl.constexpr(-0x8000000000000000)  # below the key of every score


@triton.jit
def _keys(score_TE, lane_E, NUM: tl.constexpr, WIDTH: tl.constexpr):
    """int64 keys in the order of `torch.topk` (NaN above all); of equal scores the expert with the lower id wins."""
    bits = (score_TE + 0.0).to(tl.int32, bitcast=True)  # + 0: -0 and 0 are one score
    order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    order = tl.where(score_TE != score_TE, 0x7FFFFFFF, order)
    key = (order.to(tl.int64) << 32) | (WIDTH - 1 - lane_E)[None, :].to(tl.int64)
    return tl.where((lane_E < NUM)[None, :], key, GONE)


@triton.jit
def _tile(z_ptr, mask_ptr, LENGTH, NUM: tl.constexpr, WIDTH: tl.constexpr, TOKENS: tl.constexpr, MASKED: tl.constexpr):
    """(first token, numbers from there, which exist, which are real, lanes, logits) of this program's tile."""
    start = tl.program_id(1) * TOKENS
    first = tl.program_id(0).to(tl.int64) * LENGTH + start
    token_T = tl.arange(0, TOKENS)
    exists = token_T < LENGTH - start
    lane_E = tl.arange(0, WIDTH)
    inside = exists[:, None] & (lane_E < NUM)[None, :]
    z_TE = tl.load(z_ptr + first * NUM + (token_T[:, None] * NUM + lane_E[None, :]), mask=inside, other=0.0)
    real = exists
    if MASKED:
        real = exists & (tl.load(mask_ptr + first + token_T, mask=exists, other=0) != 0)
    return first, token_T, exists, real, lane_E, z_TE


@triton.jit
def _softmax(s_TE, lane_E, NUM: tl.constexpr):
    """(probabilities, row maximum, row sum); lanes that are no expert hold 0."""
    s_TE = tl.where((lane_E < NUM)[None, :], s_TE, float("-inf"))
    top_T = tl.max(s_TE, axis=1)
    e_TE = tl.exp(s_TE - top_T[:, None])
    sum_T = tl.sum(e_TE, axis=1)
    return e_TE / sum_T[:, None], top_T, sum_T


@triton.jit
def _chosen(key, TOP: tl.constexpr):
    """Where the TOP largest keys stand, and where there is no expert."""
    for _ in tl.static_range(TOP):
        key = tl.where(key == tl.max(key, axis=1)[:, None], GONE, key)
    return key == GONE


@triton.jit
def _scores(
    z_TE, p_TE, bias_ptr, lane_E, NUM: tl.constexpr, GATE: tl.constexpr, BIASED: tl.constexpr, PLACE: tl.constexpr
):
    """What the choice is made by: without a bias on the scores the logits, with which every gate grows."""
    score_TE = z_TE
    if BIASED:
        bias_E = tl.load(bias_ptr + lane_E, mask=lane_E < NUM, other=0.0)
        if PLACE != "logits":
            score_TE = p_TE if GATE == "softmax" else score(z_TE, GATE)
        if PLACE == "multiply":
            score_TE *= (1.0 + bias_E)[None, :]
        else:
            score_TE += bias_E[None, :]
    return score_TE


@triton.jit
def _lse_squares(z_TE, real, lane_E, NUM: tl.constexpr):
    _p, high_T, total_T = _softmax(z_TE, lane_E, NUM)
    lse_T = high_T + tl.log(total_T)
    return tl.sum(tl.where(real, lse_T * lse_T, 0.0), axis=0)


@triton.jit
def forward(
    z_ptr, bias_ptr, mask_ptr, weights_ptr, ids_ptr, counts_ptr, plain_ptr, probs_ptr, scalars_ptr,
    LENGTH, SCALE,
    NUM: tl.constexpr, WIDTH: tl.constexpr, TOP: tl.constexpr, TOP_WIDTH: tl.constexpr, TOKENS: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, BIASED: tl.constexpr, PLACE: tl.constexpr, MASKED: tl.constexpr,
    MEASURE: tl.constexpr, PLAIN: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    first, token_T, exists, real, lane_E, z_TE = _tile(z_ptr, mask_ptr, LENGTH, NUM, WIDTH, TOKENS, MASKED)
    p_TE, top_T, sum_T = _softmax(log_score(z_TE, GATE), lane_E, NUM)
    key = _keys(_scores(z_TE, p_TE, bias_ptr, lane_E, NUM, GATE, BIASED, PLACE), lane_E, NUM, WIDTH)

    choice_K = tl.arange(0, TOP_WIDTH)
    ids_TK = tl.zeros([TOKENS, TOP_WIDTH], tl.int32)
    for i in tl.static_range(TOP):
        best_T = tl.max(key, axis=1)
        id_T = WIDTH - 1 - (best_T & 0xFFFFFFFF).to(tl.int32)
        ids_TK = tl.where((choice_K == i)[None, :], id_T[:, None], ids_TK)
        key = tl.where(key == best_T[:, None], GONE, key)
    chosen = (key == GONE) & (lane_E < NUM)[None, :]

    there = exists[:, None] & (choice_K < TOP)[None, :]
    z_TK = tl.load(z_ptr + first * NUM + (token_T[:, None] * NUM + ids_TK), mask=there, other=float("-inf"))
    if NORMALIZE:
        w_TK, _top, _sum = _softmax(log_score(z_TK, GATE), choice_K, TOP)
    elif GATE == "softmax":
        w_TK = tl.exp(z_TK - top_T[:, None]) / sum_T[:, None]
    else:
        w_TK = score(z_TK, GATE)
    pair_TK = token_T[:, None] * TOP + choice_K[None, :]
    tl.store(ids_ptr + first * TOP + pair_TK, ids_TK.to(tl.int64), mask=there)
    tl.store(weights_ptr + first * TOP + pair_TK, w_TK * SCALE, mask=there)

    tile = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    row = tile * NUM + lane_E
    counts_E = tl.sum((chosen & real[:, None]).to(tl.int32), axis=0)
    tl.store(counts_ptr + row, counts_E, mask=lane_E < NUM)
    if MEASURE:
        valid_TE = tl.where(real[:, None], p_TE, 0.0)
        tl.store(probs_ptr + row, tl.sum(valid_TE, axis=0), mask=lane_E < NUM)
        tl.store(scalars_ptr + 2 * tile, tl.sum(tl.sum(tl.where(chosen, valid_TE, 0.0), axis=1), axis=0))
        tl.store(scalars_ptr + 2 * tile + 1, _lse_squares(z_TE, real, lane_E, NUM) if LSE else 0.0)
    if PLAIN:
        chosen = _chosen(_keys(z_TE, lane_E, NUM, WIDTH), TOP) & (real[:, None] & (lane_E < NUM)[None, :])
        tl.store(plain_ptr + row, tl.sum(chosen.to(tl.int32), axis=0), mask=lane_E < NUM)


@triton.jit
def sum_tiles(
    counts_ptr, plain_ptr, probs_ptr, scalars_ptr, counts_out, plain_out, probs_out, scalars_out,
    TILES, NUM: tl.constexpr, LANES: tl.constexpr, ROWS: tl.constexpr, MEASURE: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The rows of a sequence's tiles added up: integers exactly, floats in fp64, in the order of the tiles."""
    sequence = tl.program_id(0).to(tl.int64)
    lane_E = tl.program_id(1) * LANES + tl.arange(0, LANES)
    counts = tl.zeros([ROWS, LANES], tl.int64)
    plain = tl.zeros([ROWS, LANES], tl.int64)
    probs = tl.zeros([ROWS, LANES], tl.float64)
    scalars = tl.zeros([ROWS, 2], tl.float64)
    two = tl.arange(0, 2)
    start = 0
    while start < TILES:  # a range over a number known only now is more than the interpreter can do with NumPy 2.4
        tile = start + tl.arange(0, ROWS)
        inside = (tile < TILES)[:, None] & (lane_E < NUM)[None, :]
        at = (sequence * TILES + tile)[:, None] * NUM + lane_E[None, :]
        counts += tl.load(counts_ptr + at, mask=inside, other=0)
        if PLAIN:
            plain += tl.load(plain_ptr + at, mask=inside, other=0)
        if MEASURE:
            probs += tl.load(probs_ptr + at, mask=inside, other=0.0)
            pair = (sequence * TILES + tile)[:, None] * 2 + two[None, :]
            scalars += tl.load(scalars_ptr + pair, mask=(tile < TILES)[:, None], other=0.0)
        start += ROWS
    out = sequence * NUM + lane_E
    tl.store(counts_out + out, tl.sum(counts, axis=0), mask=lane_E < NUM)
    if PLAIN:
        tl.store(plain_out + out, tl.sum(plain, axis=0), mask=lane_E < NUM)
    if MEASURE:
        tl.store(probs_out + out, tl.sum(probs, axis=0), mask=lane_E < NUM)
        tl.store(scalars_out + 2 * sequence + two, tl.sum(scalars, axis=0), mask=(two < 2) & (tl.program_id(1) == 0))


@triton.jit
def _from_weights(
    z_TE, p_TE, slope_TE, grad_ptr, ids_ptr, token_T, exists, lane_E, SCALE,
    NUM: tl.constexpr, TOP: tl.constexpr, GATE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The gradient for the logits that comes through the weights: with s the log score, w = softmax or score of it."""
    grad_TE = tl.zeros(z_TE.shape, tl.float32)
    chosen = tl.zeros(z_TE.shape, tl.int1)
    for i in tl.static_range(TOP):
        id_T = tl.load(ids_ptr + token_T * TOP + i, mask=exists, other=0).to(tl.int32)
        g_T = tl.load(grad_ptr + token_T * TOP + i, mask=exists, other=0.0)
        hit = id_T[:, None] == lane_E[None, :]
        grad_TE = tl.where(hit, g_T[:, None] * SCALE, grad_TE)
        chosen = chosen | hit
    if NORMALIZE:
        s_TE = tl.where(chosen, log_score(z_TE, GATE), float("-inf"))
        w_TE, _top, _sum = _softmax(s_TE, lane_E, NUM)
    elif GATE == "softmax":
        w_TE = p_TE
    else:
        w_TE = tl.where(chosen, score(z_TE, GATE), 0.0)
    if NORMALIZE or GATE == "softmax":
        mean_T = tl.sum(tl.where(chosen, w_TE * grad_TE, 0.0), axis=1)
        grad_TE = grad_TE - mean_T[:, None]
    dz_TE = w_TE * grad_TE * slope_TE
    if NORMALIZE:
        dz_TE = tl.where(chosen, dz_TE, 0.0)  # 0 times an infinite slope or logit
    return dz_TE


@triton.jit
def backward(
    z_ptr, ids_ptr, mask_ptr, grad_weights_ptr, grad_logits_ptr, coefs_ptr, fraction_ptr, dz_ptr, squares_ptr,
    LENGTH, SCALE,
    NUM: tl.constexpr, WIDTH: tl.constexpr, TOP: tl.constexpr, TOKENS: tl.constexpr, TERMS: tl.constexpr,
    GATE: tl.constexpr, NORMALIZE: tl.constexpr, MASKED: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_LOGITS: tl.constexpr, Z_LOSS: tl.constexpr, NORMS: tl.constexpr,
):  # fmt: skip
    """dz = what comes through the weights and the logits + g'/g p (q - <p, q>) per term + the z-loss.

    With NORMS a tile also writes its share of the squared norms: language model, each term, z-loss.
    """
    first, token_T, exists, real, lane_E, z_TE = _tile(z_ptr, mask_ptr, LENGTH, NUM, WIDTH, TOKENS, MASKED)
    expert = lane_E < NUM
    inside = exists[:, None] & expert[None, :]
    p_TE, _top, _sum = _softmax(log_score(z_TE, GATE), lane_E, NUM)
    slope_TE = slope(z_TE, GATE)
    at = token_T[:, None] * NUM + lane_E[None, :]  # from the tile's first logit
    square_ptr = squares_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * (TERMS + 2)

    dz_TE = tl.zeros(z_TE.shape, tl.float32)
    if HAS_WEIGHTS:
        dz_TE = _from_weights(
            z_TE,
            p_TE,
            slope_TE,
            grad_weights_ptr + first * TOP,
            ids_ptr + first * TOP,
            token_T,
            exists,
            lane_E,
            SCALE,
            NUM,
            TOP,
            GATE,
            NORMALIZE,
        )
    if HAS_LOGITS:
        dz_TE += tl.load(grad_logits_ptr + first * NUM + at, mask=inside, other=0.0)
    if NORMS:
        tl.store(square_ptr, _square(dz_TE, inside))
    outer_TE = tl.where(real[:, None] & expert[None, :], p_TE * slope_TE, 0.0)
    q_E = tl.zeros([WIDTH], tl.float64)
    for n in tl.static_range(TERMS):
        row_E = tl.load(coefs_ptr + n * NUM + lane_E, mask=expert, other=0.0)
        factor = tl.load(coefs_ptr + TERMS * NUM + n)
        at_E = (n * tl.num_programs(0) + tl.program_id(0)) * NUM + lane_E
        more_E = row_E + factor * tl.load(fraction_ptr + at_E, mask=expert, other=0.0)
        if NORMS:
            push_TE = _push(more_E, p_TE, outer_TE, expert)
            tl.store(square_ptr + 1 + n, _square(push_TE, inside))
        q_E += more_E
    if TERMS > 0:
        dz_TE += _push(q_E, p_TE, outer_TE, expert)
    if Z_LOSS:
        push_TE = _z_push(tl.load(coefs_ptr + TERMS * (NUM + 1)), z_TE, real, lane_E, NUM)
        if NORMS:
            tl.store(square_ptr + 1 + TERMS, _square(push_TE, inside))
        dz_TE += push_TE
    tl.store(dz_ptr + first * NUM + at, dz_TE, mask=inside)


@triton.jit
def _push(q_E, p_TE, outer_TE, expert):
    q_TE = q_E.to(tl.float32)[None, :]
    mean_T = tl.sum(tl.where(expert[None, :], p_TE * q_TE, 0.0), axis=1)
    return outer_TE * (q_TE - mean_T[:, None])


@triton.jit
def _z_push(factor, z_TE, real, lane_E, NUM: tl.constexpr):
    s_TE, high_T, total_T = _softmax(z_TE, lane_E, NUM)
    lse_T = high_T + tl.log(total_T)
    return tl.where(real[:, None], (2.0 * factor).to(tl.float32) * lse_T[:, None] * s_TE, 0.0)


@triton.jit
def _square(x_TE, inside):
    return tl.sum(tl.sum(tl.where(inside, x_TE * x_TE, 0.0), axis=1), axis=0)
