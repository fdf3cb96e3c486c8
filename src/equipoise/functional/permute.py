"""The order in which experts see tokens: sort by expert, pad, and the two moves between tokens and sorted rows.

A *pair* is one (token, choice), numbered ``token * K + choice``; a *row* is where a pair stands among all pairs once
they are sorted by expert. Sums over the K choices are gathers through the inverse of the sort and never scatters with
``index_add``: each output is written once, in a fixed order, so a repeat gives the same bits on every device.

An id of E is no expert, for a token that has fewer than K: such a pair is *dropped*. It stands behind all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError

__all__ = [
    "ExpertOrder",
    "PaddedRows",
    "check_ids",
    "equal_runs",
    "even_sizes",
    "gather_sum",
    "max_rows",
    "pad_rows",
    "padded_size",
    "permute",
    "sort_by_expert",
    "unpermute",
]

RUNS = (16, 4)  # so many adjacent experts may share a product; few choices, so that few shapes are compiled
MOST_IN_RUN = 256  # rows of each: beyond that a call of its own costs next to nothing


class ExpertOrder(NamedTuple):
    """Pairs sorted by expert, ties in token order: N = T * K rows, those of dropped pairs last."""

    order_N: Tensor
    """The pair that stands in each row (int64)."""
    rows_TK: Tensor
    """The row of each pair, the inverse of ``order_N`` (int64)."""
    offsets: Tensor
    """Where each expert's rows begin, and where the dropped pairs' do: (E + 1,) int64."""

    @property
    def counts_E(self) -> Tensor:
        return self.offsets.diff()


class PaddedRows(NamedTuple):
    """`ExpertOrder` with each expert's rows rounded up, and idle rows up to `max_rows`."""

    pairs_R: Tensor
    """The pair in each row; a padding row repeats a pair of its own expert, an idle one any (int64)."""
    rows_TK: Tensor
    """The row of each pair (int64); of a dropped one the last row, which is then idle."""
    sizes_E: Tensor
    """Rows of each expert with padding, idle rows left out (int64)."""
    counts_E: Tensor
    """Rows of each expert without padding (int64)."""
    drops: bool
    """Whether any pair is dropped."""


def sort_by_expert(expert_ids_TK: Tensor, num_experts: int) -> ExpertOrder:
    """Sort the T * K (token, choice) pairs by expert; stable, so an expert sees its tokens in order.

    Ids outside 0..E are not checked here, because that would wait for a GPU: see `check_ids`.

    >>> order = sort_by_expert(torch.tensor([[2, 0], [0, 1]]), num_experts=4)
    >>> order.order_N.tolist(), order.rows_TK.tolist()
    ([1, 2, 3, 0], [[3, 0], [1, 2]])
    >>> order.offsets.tolist(), order.counts_E.tolist()
    ([0, 2, 3, 4, 4], [2, 1, 1, 0])
    """
    # int32 sorts in half the time of int64 (a radix sort over the bytes of the key)
    sorted_N, order_N = torch.sort(expert_ids_TK.flatten().int(), stable=True)
    bounds = torch.arange(num_experts + 1, dtype=torch.int32, device=sorted_N.device)
    rows_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=order_N.device))
    return ExpertOrder(order_N, rows_N.view(expert_ids_TK.shape), torch.searchsorted(sorted_N, bounds))


def check_ids(expert_ids_TK: Tensor, num_experts: int, first: int, last: int) -> bool:
    """Whether any pair is dropped. Raises InputError for an id outside 0..E.

    Args:
        first, last: the ends of the offsets of `sort_by_expert`; only where they are not 0 and N are the ids looked at.

    >>> check_ids(torch.tensor([[2, 0], [4, 1]]), num_experts=4, first=0, last=3)
    True
    """
    if first == 0 and last == expert_ids_TK.numel():
        return False
    low, high = (int(end) for end in expert_ids_TK.aminmax())
    if low < 0 or high > num_experts:
        raise InputError(
            expected=f"expert ids in 0..{num_experts - 1}, or {num_experts} for none",
            got=f"ids from {low} to {high}",
            do="route over as many experts as the layer holds",
        )
    return True


def padded_size(count: int) -> int:
    """``count`` rounded up to a multiple of 1/16 of the power of two below it.

    oneDNN compiles a kernel for every new shape of a low-precision product, and that costs more than the product
    (1 ms against 0.4 at 1024 rows). These sizes keep the number of shapes small, 16 to an octave, for 3 % more rows on
    average above 32 and 6 % at most.

    >>> [padded_size(n) for n in (0, 1, 30, 100, 1000, 1030, 5000)]
    [0, 1, 30, 100, 1024, 1088, 5120]
    """
    step = 1 << max(0, count.bit_length() - 5)
    return -(-count // step) * step


def even_sizes(sizes: Sequence[int], call: int, run: int = RUNS[0]) -> list[int]:
    """The rows of adjacent experts made equal where one product for all of them is cheaper than one for each.

    Args:
        call: how many rows a call of its own costs. 16 experts, or 4, share a product that wastes fewer.

    >>> even_sizes([16, 32, 16, 16, 16, 640], call=20)
    [32, 32, 32, 32, 16, 640]
    """
    evened: list[int] = []
    for first in range(0, len(sizes), run):
        part = sizes[first : first + run]
        most, idle = max(part), part.count(0)  # whose weights a shared product reads for nothing: as dear as a call
        if most <= MOST_IN_RUN and most * len(part) - sum(part) <= call * max(len(part) - 1 - 2 * idle, 0):
            evened += [most] * len(part)
        elif run > RUNS[-1]:
            evened += even_sizes(part, call, run=RUNS[RUNS.index(run) + 1])
        else:
            evened += part
    return evened


def equal_runs(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first expert, how many) of what can be one product: what `even_sizes` made equal, else one expert.

    >>> list(equal_runs([32, 32, 32, 32, 16, 640]))
    [(0, 4), (4, 1), (5, 1)]
    """
    first = 0
    while first < len(sizes):
        for run in RUNS:
            part = sizes[first : first + run]
            if first % run == 0 and part[0] <= MOST_IN_RUN and min(part) == max(part):
                break
        else:
            part = sizes[first : first + 1]
        yield first, len(part)
        first += len(part)


def max_rows(num_pairs: int, num_experts: int, *, pad: bool = True, call: int = 0) -> int:
    """The most rows that `pad_rows` can need, known before the routing: what a compiler or an allocator asks for.

    >>> max_rows(2048, 16)
    2176
    """
    if not num_pairs:
        return 0
    return num_pairs + call * num_experts + (num_pairs // 16 if pad else 0)


def pad_rows(expert_ids_TK: Tensor, num_experts: int, *, pad: bool = True, call: int = 0) -> PaddedRows:
    """`sort_by_expert`, then padding after each expert's rows.

    Sizes are those of `padded_size` (``pad=False``: the counts), made equal by `even_sizes` for this ``call``. Idle
    rows at the end make R `max_rows`, whatever the routing.
    Padding repeats a pair of the same expert, so that a NaN in one token cannot reach another expert's gradient; an
    expert without pairs repeats one of a neighbour. What a padding row computes has to be given the weight 0.
    Raises InputError for an id outside 0..E.

    >>> rows = pad_rows(torch.tensor([[0], [1], [0], [3]]), num_experts=4, call=2)
    >>> rows.sizes_E.tolist(), rows.pairs_R[:8].tolist(), rows.rows_TK.flatten().tolist()
    ([2, 1, 0, 1], [0, 2, 1, 3, 3, 3, 3, 3], [0, 2, 1, 3])
    """
    order_N, rows_TK, offsets = sort_by_expert(expert_ids_TK, num_experts)
    bounds = offsets.tolist()
    drops = check_ids(expert_ids_TK, num_experts, bounds[0], bounds[-1])
    counts_E = offsets.diff()
    counts = [stop - start for start, stop in pairwise(bounds)]
    sizes = even_sizes([padded_size(n) for n in counts] if pad else counts, call)
    idle = max_rows(len(order_N), num_experts, pad=pad, call=call) - sum(sizes)
    if sizes == counts and not idle:
        return PaddedRows(order_N, rows_TK, counts_E, counts_E, drops)
    sizes_E, spans_E = torch.tensor([sizes, [*sizes[:-1], sizes[-1] + idle]])
    shift_E = sizes_E.cumsum(0) - sizes_E - offsets[:-1]  # what padding before an expert adds to its row numbers
    shift_R, end_R = torch.stack([shift_E, offsets[1:]]).repeat_interleave(spans_E, dim=1)
    source_R = torch.arange(len(shift_R)) - shift_R
    pairs_R = order_N.take(torch.minimum(source_R, end_R - 1).clamp_(min=0))
    if not drops:
        return PaddedRows(pairs_R, rows_TK + shift_E.take(expert_ids_TK), sizes_E, counts_E, drops)
    rows_TK = rows_TK + shift_E.take(expert_ids_TK.clamp(max=num_experts - 1))
    rows_TK.masked_fill_(expert_ids_TK == num_experts, len(pairs_R) - 1)
    return PaddedRows(pairs_R, rows_TK, sizes_E, counts_E, drops)


def permute(x_TD: Tensor, order: ExpertOrder) -> Tensor:
    """Copy each token to its K rows: (T, D) -> (N, D), sorted by expert. Its adjoint is `unpermute`.

    >>> order = sort_by_expert(torch.tensor([[1, 0], [0, 1]]), num_experts=2)
    >>> permute(torch.tensor([[1.0], [2.0]]), order).flatten().tolist()
    [1.0, 2.0, 1.0, 2.0]
    """
    return _Permute.apply(x_TD, order.order_N, order.rows_TK)


def unpermute(rows_ND: Tensor, order: ExpertOrder) -> Tensor:
    """Add up the K rows of each token: (N, D) -> (T, D). Its adjoint is `permute`.

    >>> order = sort_by_expert(torch.tensor([[1, 0], [0, 1]]), num_experts=2)
    >>> unpermute(torch.tensor([[1.0], [2.0], [10.0], [20.0]]), order).flatten().tolist()
    [11.0, 22.0]
    """
    return _Unpermute.apply(rows_ND, order.order_N, order.rows_TK)


def gather_sum(rows_RD: Tensor, rows_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """y_t = the sum over k of w_tk · rows_RD[rows_TK_tk], added in float32 or better, rounded once: (R, D) -> (T, D).

    ``weights_TK`` has the dtype of the rows; without it all are 1. On a CPU they cost nothing here.

    >>> gather_sum(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[0, 2], [1, 1]])).flatten().tolist()
    [5.0, 4.0]
    """
    if rows_RD.device.type == "cpu" and rows_TK.numel():  # one pass: a tenth of index_select + sum
        return F.embedding_bag(rows_TK, rows_RD, mode="sum", per_sample_weights=weights_TK)
    rows_TKD = rows_RD.index_select(0, rows_TK.flatten()).unflatten(0, rows_TK.shape)
    return rows_TKD.sum(1) if weights_TK is None else torch.einsum("tkd,tk->td", rows_TKD, weights_TK)


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_N, rows_TK)
        return x_TD.index_select(0, order_N // rows_TK.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order_N, rows_TK = ctx.saved_tensors
        return _Unpermute.apply(grads[0], order_N, rows_TK), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, order_N: Tensor, rows_TK: Tensor) -> Tensor:
        ctx.save_for_backward(order_N, rows_TK)
        return gather_sum(rows_ND, rows_TK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        order_N, rows_TK = ctx.saved_tensors
        return _Permute.apply(grads[0], order_N, rows_TK), None, None
