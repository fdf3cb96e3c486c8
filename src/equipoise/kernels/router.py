"""A router in two passes: from logits to choices, weights, counts and sums; and from their gradients to the logits'.

Bytes: forward reads (T, E) and writes (T, K) twice; backward reads both again and writes (T, E). The product with the
gate's weight stays a product of matrices: the logits have to be written for backward anyway, so one kernel for both
would save one read of them, an eighth of what reading the tokens costs at D = 2048 and E = 128.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, library

from .availability import load, usable

__all__ = ["STATISTICS", "Chosen", "RouterForm", "choose_and_count", "fits", "router_gradient", "summarize"]

MOST_EXPERTS, MOST_CHOICES = 1024, 16
STATISTICS = (
    "tokens",
    "routed_tokens",
    "calls",
    "nonempty_sequences",
    "topk_score",
    "lse_square",
    "maxvio_sequence",
    "maxvio_micro_batch",
    "sequences",
    "nonempty_micro_batches",
)  # of a forward, by their names in `autograd.spec`
TILE = 1024  # logits of one program: 8 a thread take 56 registers on sm_90 (ptxas), 32 take 242


class RouterForm(NamedTuple):
    """What of a router the kernels are compiled for."""

    top_k: int
    gate: str
    normalize: bool
    scale: float


class Chosen(NamedTuple):
    """What forward found; the sums are over the real tokens of each of B sequences."""

    weights_TK: Tensor
    ids_TK: Tensor  # int64
    counts_BE: Tensor  # int64
    plain_BE: Tensor  # int64: of the choices without selection bias; (0, 0) if not asked for
    probs_BE: Tensor  # fp64: sums of the gate probabilities; (0, 0) if not asked for
    scalars_B2: Tensor  # fp64: sums of the chosen probabilities, and of logsumexp^2


def fits(logits_TE: Tensor, top_k: int, num_groups: int = 1) -> bool:
    """Whether the kernels take these logits: where they run, fp32, no groups, E up to 1024, K up to 16, T not 0.

    >>> fits(torch.zeros(4, 8), 2, num_groups=4)  # group-limited selection stays in plain PyTorch
    False
    """
    tokens, num_experts = logits_TE.shape
    return (
        usable(logits_TE)
        and logits_TE.dtype == torch.float32
        and num_groups == 1
        and tokens > 0
        and num_experts <= MOST_EXPERTS
        and top_k <= MOST_CHOICES
    )


def choose_and_count(
    logits_TE: Tensor,
    form: RouterForm,
    *,
    num_sequences: int = 1,
    selection_bias_E: Tensor | None = None,
    bias_place: str = "scores",
    token_mask_T: Tensor | None = None,
    measure: bool = True,
    plain: bool = False,
    lse: bool = False,
) -> Chosen:
    """Choices, weights and sums of T tokens in ``num_sequences`` sequences, in one pass over the logits.

    `functional.routing.choose` and `count_choices` in one, with the sums that a balancer takes. Of equal scores the
    expert with the lower id is chosen. Nothing carries a gradient: see `router_gradient`.

    Args:
        bias_place: as `functional.route` has it.
        measure: sum the probabilities as well.  plain: count the choices without bias.  lse: sum logsumexp^2.

    >>> if fits(torch.zeros(1, 4), 2):  # a GPU, or the interpreter
    ...     choose_and_count(torch.tensor([[1.0, 3.0, 2.0, 0.0]]), RouterForm(2, "softmax", True, 1.0)).ids_TK
    """
    biased, wanted = (selection_bias_E, bias_place), [measure, plain, lse]
    return Chosen(*_forward(logits_TE.contiguous(), *biased, token_mask_T, num_sequences, *form, wanted))


def router_gradient(
    logits_TE: Tensor,
    ids_TK: Tensor,
    form: RouterForm,
    grad_weights_TK: Tensor | None,
    grad_logits_TE: Tensor | None = None,
    *,
    grad_coefs: Tensor | None = None,
    fraction_NBE: Tensor | None = None,
    token_mask_T: Tensor | None = None,
    z_loss: bool = False,
    norms: bool = False,
) -> tuple[Tensor, Tensor]:
    """(gradient of the logits (T, E), squared norms (N + 2,) fp64), in one pass.

    The sum of what comes through weights and logits, of each loss term's g'/g p (q - <p, q>) with
    q = row + factor f (``grad_coefs`` as `autograd.spec.StatsSpec` has them), and of the z-loss. The norms are those
    of the first, of each of the N terms and of the z-loss; zero unless ``norms``.
    """
    if grad_coefs is None or fraction_NBE is None:
        grad_coefs, fraction_NBE = logits_TE.new_empty(0), logits_TE.new_empty(0, 1, logits_TE.shape[1])
    dz_TE, squares = _backward(
        logits_TE.contiguous(),
        ids_TK,
        None if grad_weights_TK is None else grad_weights_TK.float().contiguous(),
        None if grad_logits_TE is None else grad_logits_TE.float().contiguous(),
        grad_coefs,
        fraction_NBE,
        token_mask_T,
        *form,
        [z_loss, norms],
    )
    return dz_TE, squares


def summarize(
    chosen: Chosen, size: int, offsets: list[int], spans: list[int], unbiased: list[bool], micro: int
) -> tuple[Tensor, Tensor]:
    """(statistics of `autograd.spec.StatsSpec` (forward_size,) fp64, f of every term and sequence (N, B, E) fp64).

    Args:
        size: how many statistics there are.
        offsets: where each of STATISTICS is among them.
        spans: for each term, how many neighbouring sequences share an f; 0 where only the tap knows it.
        unbiased: for each term, whether its f is that of the choices without bias.  micro: sequences of a micro-batch.
    """
    return _summarize(*chosen[2:], chosen.ids_TK.shape[1], size, offsets, spans, unbiased, micro)


def _layout(tokens: int, num_experts: int, num_sequences: int) -> tuple[int, int, int, int]:
    """(length of a sequence, lanes, tokens of a tile, tiles of a sequence)."""
    length, width = tokens // num_sequences, max(_power(num_experts), 2)
    rows = max(1, min(TILE // width, 64, _power(length)))
    return length, width, rows, -(-length // rows)


def _power(n: int) -> int:
    """The power of two that is not below n."""
    return 1 << (n - 1).bit_length()


@library.custom_op("equipoise::router_forward", mutates_args=())
def _forward(
    logits_TE: torch.Tensor,
    bias_E: torch.Tensor | None,
    bias_place: str,
    mask_T: torch.Tensor | None,
    num_sequences: int,
    top_k: int,
    gate: str,
    normalize: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    (tokens, num_experts), (measure, plain, lse) = logits_TE.shape, wanted
    length, width, rows, tiles = _layout(tokens, num_experts, num_sequences)
    outputs = _empty(logits_TE, num_sequences, top_k, measure, plain)
    weights_TK, ids_TK, counts_BE, plain_BE, probs_BE, scalars_B2 = outputs
    table = num_sequences * tiles * num_experts
    integers = logits_TE.new_empty((1 + plain) * table, dtype=torch.int32)
    floats = logits_TE.new_empty((table + 2 * num_sequences * tiles) * measure)
    flags: dict[str, Any] = {"NUM": num_experts, "MEASURE": measure, "PLAIN": plain}
    load("triton_router").forward[(num_sequences, tiles)](
        logits_TE, bias_E, _bytes(mask_T), weights_TK, ids_TK, integers, integers[table:], floats, floats[table:],
        length, float(scale), WIDTH=width, TOP=top_k, TOP_WIDTH=_power(top_k), TOKENS=rows, GATE=gate,
        NORMALIZE=normalize, BIASED=bias_E is not None, PLACE=bias_place, MASKED=mask_T is not None, LSE=lse, **flags,
    )  # fmt: skip
    lanes = min(width, 16)
    load("triton_router").sum_tiles[(num_sequences, -(-num_experts // lanes))](
        integers, integers[table:], floats, floats[table:], counts_BE, plain_BE, probs_BE, scalars_B2,
        tiles, LANES=lanes, ROWS=max(2, min(64, _power(tiles))), **flags,
    )  # fmt: skip
    return outputs


def _empty(
    logits_TE: Tensor, num_sequences: int, top_k: int, measure: bool, plain: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, num_experts = logits_TE.shape
    ids_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int64)
    table, none = (num_sequences, num_experts), (0, 0)
    return (
        logits_TE.new_empty(tokens, top_k),
        ids_TK,
        ids_TK.new_empty(table),
        ids_TK.new_empty(table if plain else none),
        logits_TE.new_empty(table if measure else none, dtype=torch.float64),
        logits_TE.new_empty((num_sequences, 2) if measure else none, dtype=torch.float64),
    )


@_forward.register_fake
def _(logits_TE, _bias, _place, _mask, num_sequences, top_k, _gate, _normalize, _scale, wanted):
    return _empty(logits_TE, num_sequences, top_k, wanted[0], wanted[1])


@library.custom_op("equipoise::router_backward", mutates_args=())
def _backward(
    logits_TE: torch.Tensor,
    ids_TK: torch.Tensor,
    grad_weights_TK: torch.Tensor | None,
    grad_logits_TE: torch.Tensor | None,
    grad_coefs: torch.Tensor,
    fraction_NBE: torch.Tensor,
    mask_T: torch.Tensor | None,
    top_k: int,
    gate: str,
    normalize: bool,
    scale: float,
    wanted: list[bool],
) -> tuple[torch.Tensor, torch.Tensor]:
    (tokens, num_experts), (terms, num_sequences, _), (z_loss, norms) = logits_TE.shape, fraction_NBE.shape, wanted
    length, width, rows, tiles = _layout(tokens, num_experts, num_sequences)
    dz_TE = torch.empty_like(logits_TE)
    squares = logits_TE.new_empty(num_sequences * tiles * norms, terms + 2)
    if norms and not z_loss:
        squares[:, -1] = 0
    load("triton_router").backward[(num_sequences, tiles)](
        logits_TE, ids_TK, _bytes(mask_T), grad_weights_TK, grad_logits_TE, grad_coefs, fraction_NBE.contiguous(),
        dz_TE, squares, length, float(scale), NUM=num_experts, WIDTH=width, TOP=top_k, TOKENS=rows, TERMS=terms,
        GATE=gate, NORMALIZE=normalize, MASKED=mask_T is not None, HAS_WEIGHTS=grad_weights_TK is not None,
        HAS_LOGITS=grad_logits_TE is not None, Z_LOSS=z_loss, NORMS=norms,
    )  # fmt: skip
    return dz_TE, squares.sum(dim=0, dtype=torch.float64)


@_backward.register_fake
def _(logits_TE, _ids, _grad_weights, _grad_logits, _coefs, fraction_NBE, _mask, _k, _gate, _norm, _scale, _wanted):
    return torch.empty_like(logits_TE), logits_TE.new_empty(fraction_NBE.shape[0] + 2, dtype=torch.float64)


def _bytes(mask_T: Tensor | None) -> Tensor | None:
    return None if mask_T is None else mask_T.contiguous().view(torch.uint8)


@library.custom_op("equipoise::router_statistics", mutates_args=())
def _summarize(
    counts_BE: torch.Tensor,
    plain_BE: torch.Tensor,
    probs_BE: torch.Tensor,
    scalars_B2: torch.Tensor,
    top_k: int,
    size: int,
    offsets: list[int],
    spans: list[int],
    unbiased: list[bool],
    micro: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_sequences, num_experts), terms, plain = counts_BE.shape, len(spans), any(unbiased)
    at = dict(zip((name.upper() for name in STATISTICS), offsets, strict=True))
    at["SEQUENCES_AT"] = at.pop("SEQUENCES")
    width = max(_power(num_experts), 2)
    if not plain_BE.numel():
        plain_BE = counts_BE  # without a bias the choices are those
    statistics = probs_BE.new_zeros(size)  # what a replay alone fills is none of the kernels'
    fraction_NBE = torch.zeros(terms, num_sequences, num_experts, dtype=torch.float64, device=counts_BE.device)
    load("triton_statistics").statistics[(1,)](
        counts_BE, plain_BE, probs_BE, scalars_B2, statistics, num_sequences, min(micro, num_sequences), top_k,
        NUM=num_experts, WIDTH=width, PLAIN=plain, TERMS=terms, SIZE=size, **at,
    )  # fmt: skip
    for n, (span, without_bias) in enumerate(zip(spans, unbiased, strict=True)):
        if span:
            load_BE, value = plain_BE if without_bias else counts_BE, statistics[size - terms + n :]
            load("triton_statistics").fractions[(1,)](
                load_BE, probs_BE, fraction_NBE[n], value, num_sequences, span, NUM=num_experts, WIDTH=width
            )
    return statistics, fraction_NBE


@_summarize.register_fake
def _(counts_BE, _plain, probs_BE, _scalars, _top_k, size, _offsets, spans, _unbiased, _micro):
    return probs_BE.new_empty(size), probs_BE.new_empty(len(spans), *counts_BE.shape)
