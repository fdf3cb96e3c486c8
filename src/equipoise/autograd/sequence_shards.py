"""Sequences whose parts lie on several ranks: their loads are added up at the tap, and backward reads the sums.

A sequence is one whatever it is cut into, so every scope inside a micro-batch (sequence, document, micro_batch,
Sequences(n)) takes f from all shards. Forward cannot know it without waiting for the others, once per layer and again
under recompute; so forward makes tables, the tap adds up those of all layers in one sum, and backward looks them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, library

from ..distributed import Group
from ..functional.load_view import seen_load
from ..functional.losses import load_fractions
from .router_state import RouterState, ShardCounts, stack_on
from .spec import LossTerm, StatsSpec
from .statistics import group_counts, micro_batches, rule_sums, shared_counts, violations

__all__ = ["ShardedFractions", "correct_for_shards", "record_shard_counts", "sharded_fractions", "sum_shards"]


class ShardedFractions(NamedTuple):
    """What backward of one call of a router reads."""

    probs_E: Tensor  # recognises the call: recompute may run the calls of a layer in another order
    fraction_NBE: Tensor
    document_NRE: Tensor | None  # f of document r = sequence * D + number
    row_T: Tensor | None  # token -> r


def record_shard_counts(state: RouterState, which: int, shard_counts: ShardCounts) -> None:
    """Keeps them for the tap; through an operator, because a compiler may not see a list grow under a checkpoint."""
    _record_shard_counts(state.pending[which], state.key, which, *shard_counts)


@library.custom_op("equipoise::record_shard_counts", mutates_args=("pending_stats",))
def _record_shard_counts(
    pending_stats: torch.Tensor,  # noqa: ARG001, said to change, or a compiler would drop a call without a result
    key: int,
    which: int,
    tokens: torch.Tensor,
    counts_CBE: torch.Tensor,
    probs_BE: torch.Tensor,
    counts_CRE: torch.Tensor | None,
    probs_RE: torch.Tensor | None,
    document_T: torch.Tensor | None,
) -> None:
    shard_counts = (tokens, counts_CBE, probs_BE, counts_CRE, probs_RE, document_T)
    copies = [None if table is None else table.clone() for table in shard_counts]  # a compiler uses their memory again
    RouterState.of(key).shard_counts[which].append(ShardCounts(*copies))  # type: ignore[arg-type]


@_record_shard_counts.register_fake
def _(pending_stats, key, which, tokens, counts_CBE, probs_BE, counts_CRE, probs_RE, document_T) -> None:  # noqa: ARG001
    return None


def sum_shards(layers: Sequence[Sequence[ShardCounts]], shards: Group) -> list[list[ShardCounts]]:
    """The tables of all layers over all shards, in one sum; documents need to know first how many there are."""
    calls = [shard_counts for of_layer in layers for shard_counts in of_layer]
    if not calls:
        return [[] for _ in layers]
    documents = _documents(calls, shards)
    parts = [part for one in calls for part in (one.tokens, one.counts_CBE, *_document_rows(one, documents))]
    device = parts[0].device
    flat = shards.sum(torch.cat([part.flatten().to(device) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    sums = iter([piece.view(part.shape).to(part.device) for piece, part in zip(pieces, parts, strict=True)])
    summed = []
    for of_layer in layers:
        summed.append([])
        for shard_counts in of_layer:
            tokens, counts_CBE = next(sums), next(sums)
            counts_CRE = None if shard_counts.counts_CRE is None else next(sums)
            summed[-1].append(shard_counts._replace(tokens=tokens, counts_CBE=counts_CBE, counts_CRE=counts_CRE))
    return summed


def _documents(calls: Sequence[ShardCounts], shards: Group) -> int:
    """The largest number of documents in a sequence, on any shard."""
    held = [
        shard_counts.document_T % _rows(shard_counts) for shard_counts in calls if shard_counts.document_T is not None
    ]
    if not held:
        return 0
    largest = [number_T.amax() + 1 for number_T in held if len(number_T)] or [held[0].new_zeros(())]
    return int(shards.max(stack_on(largest, held[0].device).amax()))


def _rows(shard_counts: ShardCounts) -> int:
    """Rows of documents that this shard keeps for each sequence."""
    assert shard_counts.counts_CRE is not None
    return max(shard_counts.counts_CRE.shape[1] // shard_counts.probs_BE.shape[0], 1)


def _document_rows(shard_counts: ShardCounts, documents: int) -> list[Tensor]:
    """Counts per document (C, B * D, E): shards may differ in length, but number the documents of a sequence alike."""
    if shard_counts.counts_CRE is None:
        return []
    kinds, batch, experts = shard_counts.counts_CBE.shape
    padded = shard_counts.counts_CRE.new_zeros(kinds, batch, documents, experts)
    held = shard_counts.counts_CRE.view(kinds, batch, -1, experts)[:, :, :documents]
    padded[:, :, : held.shape[2]] = held
    return [padded.flatten(1, 2)]


def correct_for_shards(
    spec: StatsSpec, statistics: Tensor, local: Sequence[ShardCounts], summed: Sequence[ShardCounts]
) -> tuple[Tensor, Tensor, Tensor, list[ShardedFractions]]:
    """(statistics as of whole sequences (forward_size,), counts of this rank's sequences (E,), their tokens, f for
    backward).

    Only what depends on a sequence's load changes: values of the local terms, MaxVio, how many sequences and
    micro-batches are not empty, rules of a micro-batch's load.
    """
    statistics = statistics.clone()
    names = ("nonempty_sequences", "maxvio_sequence", "nonempty_micro_batches", "maxvio_micro_batch")
    for value, term in zip(spec.values(statistics), spec.terms, strict=True):
        if term.kind != "entropy":  # which knows no load
            value.zero_()
    spec.rule_sums(statistics).zero_()
    for name in names:
        spec.scalar(statistics, name).zero_()
    counts_E, found = torch.zeros_like(spec.counts(statistics)), []
    for mine, shard_counts in zip(local, summed, strict=True):
        counts_BE = shard_counts.counts_CBE[0]
        counts_E = counts_E + counts_BE.sum(dim=0)
        seen = []
        for counts in (counts_BE, group_counts(counts_BE, micro_batches(spec))):
            seen += [(counts.sum(dim=-1) > 0).sum(), violations(load_fractions(counts)).sum()]
        for name, value in zip(names, seen, strict=True):
            spec.scalar(statistics, name).add_(value)
        for total_E, sum_E in zip(spec.rule_sums(statistics), rule_sums(spec, counts_BE), strict=True):
            total_E.add_(sum_E)
        fractions = _fractions(spec, mine, shard_counts)
        found.append(fractions)
        spec.values(statistics).add_(spec.num_experts * _values(spec, mine, fractions))
    return statistics, counts_E, torch.stack([one.tokens for one in summed]).sum(), found


def _fractions(spec: StatsSpec, local: ShardCounts, summed: ShardCounts) -> ShardedFractions:
    kinds, probs_E = [int(term.unbiased) for term in spec.terms], local.probs_BE.sum(dim=0)
    sequences = [shared_counts(summed.counts_CBE[kind], term) for kind, term in zip(kinds, spec.terms, strict=True)]
    no_terms = local.probs_BE.new_zeros((0, *local.probs_BE.shape))
    fraction_NBE = _seen(spec.terms, load_fractions(torch.stack(sequences))) if sequences else no_terms
    if summed.counts_CRE is None or local.document_T is None:
        return ShardedFractions(probs_E, fraction_NBE, None, None)
    documents = [term for term in spec.terms if term.kind == "document"]
    fraction_NRE = load_fractions(summed.counts_CRE[[int(term.unbiased) for term in documents]])
    held, shared = _rows(local), summed.counts_CRE.shape[1] // local.probs_BE.shape[0]
    row_T = local.document_T // held * shared + local.document_T % held
    return ShardedFractions(probs_E, fraction_NBE, _seen(documents, fraction_NRE), row_T)


def _seen(terms: Sequence[LossTerm], fraction_NE: Tensor) -> Tensor:
    """(N, ..., E) as each term sees it."""
    if all(term.view is None for term in terms):
        return fraction_NE
    return torch.stack([seen_load(term.view, one) for term, one in zip(terms, fraction_NE, strict=True)])


def _values(spec: StatsSpec, local: ShardCounts, fractions: ShardedFractions) -> Tensor:
    """Sum over this rank's tokens of <f, p>, one per term."""
    values, documents = [], 0
    for i, term in enumerate(spec.terms):
        if term.kind == "document":
            assert fractions.document_NRE is not None and local.document_T is not None and local.probs_RE is not None
            fraction_RE = torch.zeros_like(local.probs_RE)
            fraction_RE[local.document_T] = fractions.document_NRE[documents][fractions.row_T]
            values.append((fraction_RE * local.probs_RE).sum())
            documents += 1
        else:
            values.append((fractions.fraction_NBE[i] * local.probs_BE).sum())
    return torch.stack(values) if values else local.probs_BE.new_zeros(0)


def sharded_fractions(
    key: int, grad: Tensor, probs_E: Tensor, fraction_NBE: Tensor, fraction_NTE: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """f of the local terms over all shards, per sequence and (for documents) per token, once ``grad`` has arrived.

    Args:
        probs_E: summed over the tokens of this call, which it is recognised by.
        fraction_NBE, fraction_NTE: f as this rank alone sees it.
    """
    documents = fraction_NBE.new_zeros(0) if fraction_NTE is None else fraction_NTE
    sequences, documents = _sharded_fractions(grad, probs_E, fraction_NBE, documents, key)
    return sequences, None if fraction_NTE is None else documents


@library.custom_op("equipoise::sharded_fractions", mutates_args=())
def _sharded_fractions(
    grad: torch.Tensor,  # noqa: ARG001, a compiler may not move this before it
    probs_E: torch.Tensor,
    fraction_NBE: torch.Tensor,
    fraction_NTE: torch.Tensor,
    key: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    known: list[ShardedFractions] = RouterState.of(key).sharded_fractions
    if not known:  # released: nothing is pushed now
        return torch.zeros_like(fraction_NBE), torch.zeros_like(fraction_NTE)
    mine = known[0]
    if len(known) > 1:  # the nearest, because a recompute may differ by rounding
        mine = known[int(torch.stack([(one.probs_E - probs_E).abs().sum() for one in known]).argmin())]
    documents = torch.zeros_like(fraction_NTE)
    if mine.document_NRE is not None and mine.row_T is not None:
        documents = mine.document_NRE[:, mine.row_T].to(fraction_NTE.dtype)
    return mine.fraction_NBE.to(fraction_NBE.dtype, copy=True), documents


@_sharded_fractions.register_fake
def _(grad, probs_E, fraction_NBE, fraction_NTE, key):  # noqa: ARG001
    return torch.empty_like(fraction_NBE), torch.empty_like(fraction_NTE)
