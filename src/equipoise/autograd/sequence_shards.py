"""Sequences whose parts lie on several ranks: their loads are added up at the tap, and backward reads the sums.

A sequence is one whatever it is cut into, so every scope inside a micro-batch (sequence, document, micro_batch,
Sequences(n)) takes f from all shards. Forward cannot know it without waiting for the others, once per layer and again
under recompute; so forward proposes tables, the tap adds up those of all layers in one sum, and backward looks them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, library

from ..distributed import Group
from ..functional.losses import load_fractions
from .router_state import Meter, Tables, gathered
from .spec import Plan
from .statistics import group_counts, micro_batches, shared_counts, violations

__all__ = ["Late", "correct", "late_fractions", "propose", "sum_tables"]


class Late(NamedTuple):
    """What backward of one call of a router reads."""

    probs_E: Tensor  # recognises the call: recompute may run the calls of a layer in another order
    fraction_NBE: Tensor
    document_NRE: Tensor | None  # f of document r = sequence * D + number
    row_T: Tensor | None  # token -> r


def propose(meter: Meter, which: int, tables: Tables) -> None:
    """Forward proposes; through an operator, because a compiler may not see a list grow under a checkpoint."""
    _propose(meter.slots[which], meter.key, which, *tables)


@library.custom_op("equipoise::propose", mutates_args=("slot",))
def _propose(
    slot: torch.Tensor,  # noqa: ARG001, said to change, or a compiler would drop a call without a result
    key: int,
    which: int,
    counts_CBE: torch.Tensor,
    probs_BE: torch.Tensor,
    counts_CRE: torch.Tensor | None,
    probs_RE: torch.Tensor | None,
    document_T: torch.Tensor | None,
) -> None:
    tables = (counts_CBE, probs_BE, counts_CRE, probs_RE, document_T)
    copies = [None if table is None else table.clone() for table in tables]  # a compiler uses their memory again
    Meter.of(key).tables[which].append(Tables(*copies))  # type: ignore[arg-type]


@_propose.register_fake
def _(slot, key, which, counts_CBE, probs_BE, counts_CRE, probs_RE, document_T) -> None:  # noqa: ARG001
    return None


def sum_tables(layers: Sequence[Sequence[Tables]], shards: Group) -> list[list[Tables]]:
    """The tables of all layers over all shards, in one sum; documents need to know first how many there are."""
    calls = [tables for of_layer in layers for tables in of_layer]
    if not calls:
        return [[] for _ in layers]
    documents = _documents(calls, shards)
    parts = [part for tables in calls for part in (tables.counts_CBE, *_document_rows(tables, documents))]
    device = parts[0].device
    flat = shards.sum(torch.cat([part.flatten().to(device) for part in parts]))
    pieces = flat.split([part.numel() for part in parts])
    sums = iter([piece.view(part.shape).to(part.device) for piece, part in zip(pieces, parts, strict=True)])
    summed = []
    for of_layer in layers:
        summed.append([])
        for tables in of_layer:
            counts_CBE = next(sums)
            counts_CRE = None if tables.counts_CRE is None else next(sums)
            summed[-1].append(tables._replace(counts_CBE=counts_CBE, counts_CRE=counts_CRE))
    return summed


def _documents(calls: Sequence[Tables], shards: Group) -> int:
    """The largest number of documents in a sequence, on any shard."""
    held = [tables.document_T % _rows(tables) for tables in calls if tables.document_T is not None]
    if not held:
        return 0
    largest = [number_T.amax() + 1 for number_T in held if len(number_T)] or [held[0].new_zeros(())]
    return int(shards.max(gathered(largest, held[0].device).amax()))


def _rows(tables: Tables) -> int:
    """Rows of documents that this shard keeps for each sequence."""
    assert tables.counts_CRE is not None
    return max(tables.counts_CRE.shape[1] // tables.probs_BE.shape[0], 1)


def _document_rows(tables: Tables, documents: int) -> list[Tensor]:
    """Counts per document (C, B * D, E): shards may differ in length, but number the documents of a sequence alike."""
    if tables.counts_CRE is None:
        return []
    kinds, batch, experts = tables.counts_CBE.shape
    padded = tables.counts_CRE.new_zeros(kinds, batch, documents, experts)
    held = tables.counts_CRE.view(kinds, batch, -1, experts)[:, :, :documents]
    padded[:, :, : held.shape[2]] = held
    return [padded.flatten(1, 2)]


def correct(
    plan: Plan, statistics: Tensor, local: Sequence[Tables], summed: Sequence[Tables]
) -> tuple[Tensor, Tensor, list[Late]]:
    """(statistics as if this rank had seen whole sequences (forward_size,), counts of its sequences (E,), late f).

    Only what depends on a sequence's load changes: values of the local terms, MaxVio, how many sequences and
    micro-batches are not empty.
    """
    statistics = statistics.clone()
    names = ("sequences", "maxvio_sequence", "micro_batches", "maxvio_micro_batch")
    statistics[plan.values_at :] = 0
    for name in names:
        statistics[plan.at(name)] = 0
    counts_E, late = torch.zeros_like(statistics[: plan.num_experts]), []
    for mine, tables in zip(local, summed, strict=True):
        counts_BE = tables.counts_CBE[0]
        counts_E = counts_E + counts_BE.sum(dim=0)
        seen = []
        for counts in (counts_BE, group_counts(counts_BE, micro_batches(plan))):
            seen += [(counts.sum(dim=-1) > 0).sum(), violations(load_fractions(counts)).sum()]
        for name, value in zip(names, seen, strict=True):
            statistics[plan.at(name)] += value
        fractions = _late(plan, mine, tables)
        late.append(fractions)
        statistics[plan.values_at :] += plan.num_experts * _values(plan, mine, fractions)
    return statistics, counts_E, late


def _late(plan: Plan, local: Tables, summed: Tables) -> Late:
    kinds, probs_E = [int(term.unbiased) for term in plan.terms], local.probs_BE.sum(dim=0)
    sequences = [shared_counts(summed.counts_CBE[kind], term) for kind, term in zip(kinds, plan.terms, strict=True)]
    no_terms = local.probs_BE.new_zeros((0, *local.probs_BE.shape))
    fraction_NBE = load_fractions(torch.stack(sequences)) if sequences else no_terms
    if summed.counts_CRE is None or local.document_T is None:
        return Late(probs_E, fraction_NBE, None, None)
    documents = [kind for kind, term in zip(kinds, plan.terms, strict=True) if term.kind == "document"]
    held, shared = _rows(local), summed.counts_CRE.shape[1] // local.probs_BE.shape[0]
    row_T = local.document_T // held * shared + local.document_T % held
    return Late(probs_E, fraction_NBE, load_fractions(summed.counts_CRE[documents]), row_T)


def _values(plan: Plan, local: Tables, late: Late) -> Tensor:
    """Sum over this rank's tokens of <f, p>, one per term."""
    values, documents = [], 0
    for i, term in enumerate(plan.terms):
        if term.kind == "document":
            assert late.document_NRE is not None and local.document_T is not None and local.probs_RE is not None
            fraction_RE = torch.zeros_like(local.probs_RE)
            fraction_RE[local.document_T] = late.document_NRE[documents][late.row_T]
            values.append((fraction_RE * local.probs_RE).sum())
            documents += 1
        else:
            values.append((late.fraction_NBE[i] * local.probs_BE).sum())
    return torch.stack(values) if values else local.probs_BE.new_zeros(0)


def late_fractions(
    key: int, grad: Tensor, probs_E: Tensor, fraction_NBE: Tensor, fraction_NTE: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """f of the local terms over all shards, per sequence and (for documents) per token, once ``grad`` has arrived.

    Args:
        probs_E: summed over the tokens of this call, which it is recognised by.
        fraction_NBE, fraction_NTE: f as this rank alone sees it.
    """
    documents = fraction_NBE.new_zeros(0) if fraction_NTE is None else fraction_NTE
    sequences, documents = _late_fractions(grad, probs_E, fraction_NBE, documents, key)
    return sequences, None if fraction_NTE is None else documents


@library.custom_op("equipoise::late_fractions", mutates_args=())
def _late_fractions(
    grad: torch.Tensor,  # noqa: ARG001, a compiler may not move this before it
    probs_E: torch.Tensor,
    fraction_NBE: torch.Tensor,
    fraction_NTE: torch.Tensor,
    key: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    late: list[Late] = Meter.of(key).late
    if not late:  # released: nothing is pushed now
        return torch.zeros_like(fraction_NBE), torch.zeros_like(fraction_NTE)
    mine = late[0]
    if len(late) > 1:  # the nearest, because a recompute may differ by rounding
        mine = late[int(torch.stack([(one.probs_E - probs_E).abs().sum() for one in late]).argmin())]
    documents = torch.zeros_like(fraction_NTE)
    if mine.document_NRE is not None and mine.row_T is not None:
        documents = mine.document_NRE[:, mine.row_T].to(fraction_NTE.dtype)
    return mine.fraction_NBE.to(fraction_NBE.dtype, copy=True), documents


@_late_fractions.register_fake
def _(grad, probs_E, fraction_NBE, fraction_NTE, key):  # noqa: ARG001
    return torch.empty_like(fraction_NBE), torch.empty_like(fraction_NTE)
