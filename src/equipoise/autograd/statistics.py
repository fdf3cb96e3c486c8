"""What one call of a router adds to the step's statistics: sums over its tokens, and numbers of their loads.

A pass over (T, E) costs by its size and the rest by its number of operations, so the loads of all terms are one tensor.
Legend: T tokens, B sequences, S tokens a sequence, E experts, N loss terms, C = 2 where unbiased choices count too.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..functional.gates import wide
from ..functional.load_view import seen_load
from ..functional.losses import load_fractions
from ..functional.quantile import Selection, choice_offsets, count_offsets, exact_quantile
from ..functional.routing import count_choices, gate_probs, gate_slope, without_autocast
from ..functional.top_k import top_k_ids
from ..functional.updates import RULES
from .router_state import ShardCounts
from .spec import SCALARS, LossTerm, StatsSpec
from .token_classes import ClassStats, class_statistics
from .token_layout import TokenLayout

__all__ = ["Measured", "group_counts", "measure", "micro_batches", "rule_sums", "shared_counts", "violations"]

SEQUENCE = LossTerm("sequences", 1)
DocumentCounts = dict[tuple[bool, str | None], Tensor]  # (unbiased or not, class of tokens) -> (R, E)


class Measured(NamedTuple):
    """One micro-batch at one router, as forward sees it; none of it carries a gradient."""

    probs_TE: Tensor
    statistics: Tensor  # (spec.forward_size,) fp64
    fraction_NBE: Tensor  # f of the local terms per sequence, in p's dtype; zero rows for the others
    fraction_NTE: Tensor | None  # f of the document terms per token
    gram_EE: Tensor | None
    shard_counts: ShardCounts | None  # where the spec is sharded
    classes_CT: Tensor | None = None  # the valid tokens of each class, where a term is of one


@torch.no_grad()
def measure(
    spec: StatsSpec,
    logits_TE: Tensor,
    ids_TK: Tensor,
    counts_BE: Tensor,
    batch: TokenLayout,
    probs_TE: Tensor | None = None,
    selection: Selection | None = None,
    replayed_T2: Tensor | None = None,
) -> Measured:
    """All statistics of one micro-batch at one router.

    Args:
        counts_BE: the dispatched choices per sequence.
        probs_TE: the gate probabilities, where the router has them for its weights.
        selection: how the choice was made, where the spec asks.
        replayed_T2: of `routing_calls.Dispatch`.
    """
    num_sequences, num_experts = counts_BE.shape
    probs_TE = gate_probs(logits_TE, spec.gate) if probs_TE is None else probs_TE.detach()
    mask_T1 = None if batch.token_mask_T is None else batch.token_mask_T.to(probs_TE.dtype).unsqueeze(-1)
    valid_TE = probs_TE if mask_T1 is None else probs_TE * mask_T1
    length = probs_TE.shape[0] // num_sequences
    probs_BE = valid_TE.view(num_sequences, length, num_experts).sum(dim=1)  # pairwise; to fp64 it would be copied
    counts_BE, unbiased_TK, unbiased_BE = counts_BE.double(), ids_TK, None
    if spec.unbiased:
        unbiased_TK = _unbiased_ids(spec, logits_TE, ids_TK)
        unbiased_BE = count_choices(unbiased_TK, num_experts, batch.token_mask_T, num_sequences).double()

    of_class = class_statistics(spec, ids_TK, valid_TE, batch, num_sequences) if spec.classes else {}
    fractions, loads = _fractions([SEQUENCE, micro_batches(spec), *spec.terms], counts_BE, unbiased_BE, of_class)
    of_documents = _of_documents(spec, ids_TK, unbiased_TK, batch, of_class)
    values, documents = _term_values(spec, fractions[2:], of_documents, probs_BE, valid_TE, batch, of_class)
    counts_E = counts_BE.sum(dim=0)
    parts = [counts_E, probs_BE.sum(dim=0)] + ([] if unbiased_BE is None else [unbiased_BE.sum(dim=0)])
    parts += _of_rules(spec, logits_TE, ids_TK, counts_BE, batch, selection)
    parts += [part for one in of_class.values() for part in one.summed]
    scalars = _scalars(spec, logits_TE, valid_TE, ids_TK, counts_BE, counts_E, batch)
    scalars["maxvio_sequence"], scalars["maxvio_micro_batch"] = loads
    scalars["replayed_choices"], scalars["replay_gap"] = _replayed(replayed_T2, batch.token_mask_T)
    if batch.num_sequences is None:  # which tokens are one sequence is not known, so nothing is said of sequences
        scalars["nonempty_sequences"] = scalars["maxvio_sequence"] = None
    statistics = torch.cat([*parts, _stacked([*(scalars[name] for name in SCALARS), *values])])
    shard_counts = None
    if spec.shards > 1:
        counts_CBE = torch.stack([counts_BE] if unbiased_BE is None else [counts_BE, unbiased_BE])
        tokens = spec.scalar(statistics, "tokens").clone()
        shard_counts = _tables(tokens, counts_CBE, probs_BE.double(), of_documents, valid_TE, batch)
    return Measured(
        probs_TE,
        statistics,
        _stack_terms(fractions[2:], probs_BE),
        torch.stack(documents) if documents else None,
        _gram(valid_TE, gate_slope(logits_TE, spec.gate)) if spec.gram else None,
        shard_counts,
        torch.stack([one.mask_T for one in of_class.values()]) if spec.term_classes else None,
    )


def _unbiased_ids(spec: StatsSpec, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """As many experts as each token has, by its logits alone."""
    unbiased_TK = top_k_ids(logits_TE, ids_TK.shape[1])  # K of this call: it may change while one trains
    if not spec.idle_experts:
        return unbiased_TK
    used_T1 = (ids_TK < spec.num_experts).sum(dim=-1, keepdim=True)
    place_K = torch.arange(ids_TK.shape[1], device=ids_TK.device)
    return unbiased_TK.masked_fill(place_K >= used_T1, spec.num_experts)


def _of_rules(
    spec: StatsSpec,
    logits_TE: Tensor,
    ids_TK: Tensor,
    counts_BE: Tensor,
    batch: TokenLayout,
    selection: Selection | None,
) -> list[Tensor]:
    """What bias rules ask for: those of each micro-batch, and the bins of offsets."""
    offset_TE = choice_offsets(logits_TE, ids_TK, spec.gate, selection) if spec.needs_selection else None
    parts = list(rule_sums(spec, counts_BE, offset_TE, batch.token_mask_T, ids_TK.shape[1]))
    if spec.quantile and offset_TE is not None:
        parts.append(count_offsets(offset_TE, batch.token_mask_T).flatten())
    return parts


def _term_values(
    spec: StatsSpec,
    fractions: list[Tensor | None],
    of_documents: DocumentCounts,
    probs_BE: Tensor,
    valid_TE: Tensor,
    batch: TokenLayout,
    of_class: dict[str, ClassStats],
) -> tuple[list[Tensor | None], list[Tensor]]:
    """(sum over tokens of E <f, p> for each term, None where forward does not know f; f of the document terms)."""
    values, documents = [], []
    for term, fraction_BE in zip(spec.terms, fractions, strict=True):
        if term.kind == "entropy":
            values.append(torch.special.entr(valid_TE).sum(dtype=torch.float64))
        elif term.kind == "document":
            counts_RE = of_documents[term.unbiased, term.tokens]
            fraction_TE = seen_load(term.view, load_fractions(counts_RE))[batch.document_T]
            documents.append(fraction_TE.to(valid_TE.dtype))
            own_TE = valid_TE if term.tokens is None else valid_TE * of_class[term.tokens].mask_T.unsqueeze(-1)
            values.append(spec.num_experts * (fraction_TE * own_TE).sum(dtype=torch.float64))
        else:
            own_BE = probs_BE if term.tokens is None else of_class[term.tokens].probs_BE
            values.append(None if fraction_BE is None else spec.num_experts * (fraction_BE * own_BE).sum())
    return values, documents


def _of_documents(
    spec: StatsSpec, ids_TK: Tensor, unbiased_TK: Tensor, batch: TokenLayout, of_class: dict[str, ClassStats]
) -> DocumentCounts:
    """The counts of each document that the document terms are made of."""
    found: DocumentCounts = {}
    kinds = {(term.unbiased, term.tokens) for term in spec.terms if term.kind == "document"}
    for unbiased, name in sorted(kinds, key=lambda kind: (kind[0], kind[1] or "")):
        own = batch if name is None else batch._replace(token_mask_T=of_class[name].mask_T)
        found[unbiased, name] = _document_counts(unbiased_TK if unbiased else ids_TK, spec, own)
    return found


def micro_batches(spec: StatsSpec) -> LossTerm:
    """The sequences that are one micro-batch: all of a pass, or groups of them."""
    return LossTerm("micro_batch") if spec.micro_sequences is None else LossTerm("sequences", spec.micro_sequences)


def rule_sums(
    spec: StatsSpec, counts_BE: Tensor, offset_TE: Tensor | None = None, mask_T: Tensor | None = None, top_k: int = 1
) -> list[Tensor]:
    """For each micro-batch rule its sum over the micro-batches of these sequences, (E,); an empty one adds 0.

    ``offset_TE``: for the quantile rule, `choice_offsets`.
    """
    if not spec.micro_rules:
        return []
    counts_GE = group_counts(counts_BE, micro_batches(spec))
    return [
        _quantile_sum(spec, len(counts_BE), offset_TE, mask_T, top_k)
        if rule == "quantile"
        else RULES[rule](counts_GE).sum(dim=0)
        for rule in spec.micro_rules
    ]


def _quantile_sum(
    spec: StatsSpec, sequences: int, offset_TE: Tensor | None, mask_T: Tensor | None, top_k: int
) -> Tensor:
    """(E,) the exact quantiles of each micro-batch, summed."""
    assert offset_TE is not None
    tokens = len(offset_TE) // sequences * min(spec.micro_sequences or sequences, sequences)
    parts = offset_TE.split(tokens)
    masks = [None] * len(parts) if mask_T is None else mask_T.split(tokens)
    share_E = offset_TE.new_full((spec.num_experts,), top_k / spec.num_experts)
    found = [exact_quantile(one_TE, share_E, mask) for one_TE, mask in zip(parts, masks, strict=True)]
    return torch.stack(found).sum(dim=0)


def violations(fraction_BE: Tensor) -> Tensor:
    """MaxVio of each row (B,), from its f: E max f - 1, and 0 where nothing was counted."""
    return (fraction_BE.shape[-1] * fraction_BE.amax(dim=-1) - 1).clamp(min=0)


def _fractions(
    terms: list[LossTerm], counts_BE: Tensor, unbiased_BE: Tensor | None, of_class: dict[str, ClassStats]
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """(f of each term, (B, E) or (1, E) where all sequences share it, None where forward does not know it;
    MaxVio summed over the sequences and over the micro-batches, which are the first two terms)."""
    one = len(counts_BE) == 1
    counted = [term._replace(view=None) for term in terms]  # one count, however it is seen
    keys = [key._replace(kind="sequences", sequences=1) if one and _is_local(key) else key for key in counted]
    distinct = [key for key in dict.fromkeys(keys) if _is_local(key)]
    rows = []
    for key in distinct:
        chosen_BE = counts_BE if unbiased_BE is None or not key.unbiased else unbiased_BE
        chosen_BE = chosen_BE if key.tokens is None else of_class[key.tokens].counts_BE
        rows.append(chosen_BE if one else group_counts(chosen_BE, key))
    sizes = [len(row_RE) for row_RE in rows]
    found_RE = load_fractions(torch.cat(rows) if len(rows) > 1 else rows[0])
    of = dict(zip(distinct, found_RE.split(sizes) if len(rows) > 1 else [found_RE], strict=True))
    vio_R = violations(found_RE)
    of_first = vio_R[: sizes[0]].sum()
    of_second = of_first if keys[0] == keys[1] else vio_R[sizes[0] : sizes[0] + sizes[1]].sum()
    seen = [
        None if key not in of else seen_load(term.view, of[key]) for term, key in zip(terms[2:], keys[2:], strict=True)
    ]
    spread = (_of_each(one, key, len(counts_BE)) for one, key in zip(seen, keys[2:], strict=True))
    fractions = [None, None, *spread]
    return fractions, [of_first, of_second]


def _of_each(fraction_GE: Tensor | None, term: LossTerm, num_sequences: int) -> Tensor | None:
    """What each sequence shares with its group, (B, E); (1, E) where all are one group."""
    if fraction_GE is None or len(fraction_GE) in (1, num_sequences):
        return fraction_GE
    return fraction_GE.repeat_interleave(term.sequences, dim=0)[:num_sequences]


def _is_local(term: LossTerm) -> bool:
    return term.kind in ("sequences", "micro_batch")


def _stack_terms(fractions: list[Tensor | None], probs_BE: Tensor) -> Tensor:
    """(N, B, E) in p's dtype."""
    if all(one is None for one in fractions):
        return probs_BE.new_zeros((len(fractions), *probs_BE.shape))
    none = torch.zeros_like(probs_BE) if any(one is None for one in fractions) else probs_BE
    return torch.stack([none if one is None else one.to(probs_BE.dtype).expand_as(probs_BE) for one in fractions])


def _stacked(numbers: list[Tensor | None]) -> Tensor:
    """(len,) fp64; None is 0."""
    known = next(number for number in numbers if number is not None and number.dtype == torch.float64)
    zero = torch.zeros_like(known) if any(number is None for number in numbers) else known
    return torch.stack([zero if number is None else number.double() for number in numbers])


def _scalars(
    spec: StatsSpec,
    logits_TE: Tensor,
    valid_TE: Tensor,
    ids_TK: Tensor,
    counts_BE: Tensor,
    counts_E: Tensor,
    batch: TokenLayout,
) -> dict[str, Tensor | None]:
    """The SCALARS, but for those of the loads and of a replay."""
    mask_T, sequences = batch.token_mask_T, len(counts_BE) if len(logits_TE) else 0
    # counted, and not reckoned from the choices: how many a token makes may change while one trains
    routed = counts_E.new_full((), len(logits_TE)) if mask_T is None else mask_T.sum().double()
    rows, calls = counts_E.new_full((), sequences), torch.ones_like(routed)
    if mask_T is None and not spec.idle_experts:
        number = -(-sequences // (spec.micro_sequences or max(sequences, 1)))
        full, groups = rows, calls if number == 1 else counts_E.new_full((), number)
    else:
        full, groups = (
            (group_counts(counts_BE, term).sum(dim=-1) > 0).sum().double() for term in (SEQUENCE, micro_batches(spec))
        )
    lse_square = None
    if spec.z_loss:
        lse_T = wide(logits_TE).logsumexp(dim=-1).double().square()
        lse_square = (lse_T if mask_T is None else lse_T * mask_T).sum()
    scores_TK = valid_TE.gather(-1, ids_TK.clamp(max=spec.num_experts - 1) if spec.idle_experts else ids_TK)
    if spec.idle_experts:
        scores_TK = scores_TK * (ids_TK < spec.num_experts)
    tokens = routed if batch.valid_T is None else batch.valid_T.sum().double()
    return {
        "tokens": tokens,
        "routed_tokens": routed,
        "calls": calls,
        "nonempty_sequences": full,
        "topk_score": scores_TK.sum(),
        "lse_square": lse_square,
        "sequences": rows,
        "nonempty_micro_batches": groups,
    }


def _replayed(replayed_T2: Tensor | None, mask_T: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """(choices replayed, those that the router would not have made) of the valid tokens."""
    if replayed_T2 is None:
        return None, None
    replayed, gap = (replayed_T2 if mask_T is None else replayed_T2 * mask_T.unsqueeze(1)).sum(dim=0).unbind()
    return replayed, gap


def _tables(
    tokens: Tensor,
    counts_CBE: Tensor,
    probs_BE: Tensor,
    of_documents: DocumentCounts,
    valid_TE: Tensor,
    batch: TokenLayout,
) -> ShardCounts:
    if not of_documents:
        return ShardCounts(tokens, counts_CBE, probs_BE, None, None, None)
    any_RE = next(iter(of_documents.values()))
    kinds = [False, True][: len(counts_CBE)]
    counts_CRE = torch.stack([of_documents.get((kind, None), torch.zeros_like(any_RE)) for kind in kinds])
    assert batch.document_T is not None
    probs_RE = torch.zeros_like(any_RE, dtype=torch.float64).index_add_(0, batch.document_T, valid_TE.double())
    return ShardCounts(tokens, counts_CBE, probs_BE, counts_CRE.double(), probs_RE, batch.document_T)


def shared_counts(counts_BE: Tensor, term: LossTerm) -> Tensor:
    """Counts that each sequence's f is made of: its own, those of its group of n, or the whole micro-batch's."""
    if not _is_local(term):
        return torch.zeros_like(counts_BE)
    groups_GE = group_counts(counts_BE, term)
    if len(groups_GE) == 1:
        return groups_GE.expand_as(counts_BE)
    return groups_GE if term.sequences == 1 else groups_GE.repeat_interleave(term.sequences, dim=0)[: len(counts_BE)]


def group_counts(counts_BE: Tensor, term: LossTerm) -> Tensor:
    """(G, E) counts of each group of sequences that a local term measures over.

    >>> group_counts(torch.tensor([[1, 0], [2, 0], [0, 5]]), LossTerm("sequences", 2))
    tensor([[3, 0],
            [0, 5]])
    """
    num_sequences, size = len(counts_BE), term.sequences
    if term.kind == "micro_batch" or size >= num_sequences:
        return counts_BE.sum(dim=0, keepdim=True)
    if size == 1:
        return counts_BE
    if num_sequences % size:
        counts_BE = torch.nn.functional.pad(counts_BE, (0, 0, 0, size - num_sequences % size))
    return counts_BE.view(-1, size, counts_BE.shape[1]).sum(dim=1)


def _document_counts(ids_TK: Tensor, spec: StatsSpec, batch: TokenLayout) -> Tensor:
    """(R, E) choices of each document."""
    if batch.document_T is None:
        raise InputError(
            expected="document_ids for a policy with scope 'document'",
            got="none",
            do="pass document_ids_BS to the MoE layer, or balance per sequence",
        )
    (tokens, top_k), choices = ids_TK.shape, spec.num_experts + spec.idle_experts
    flat_TK = batch.document_T.unsqueeze(1) * choices + ids_TK
    one_T = torch.ones_like(batch.document_T) if batch.token_mask_T is None else batch.token_mask_T.long()
    counts = torch.zeros(tokens * spec.shards * choices, dtype=torch.int64, device=ids_TK.device)
    counts.scatter_add_(0, flat_TK.reshape(-1), one_T.unsqueeze(1).expand(-1, top_k).reshape(-1))
    return counts.view(-1, choices)[:, : spec.num_experts]


def _gram(valid_TE: Tensor, slope_TE: Tensor) -> Tensor:
    """Sum over tokens of J^T J, where J f = h (f - <p, f>) is the gradient at the logits that a fraction f causes."""
    square_TE = (slope_TE * valid_TE).square()
    with without_autocast(valid_TE):
        cross_EE = square_TE.T @ valid_TE
        outer_EE = valid_TE.T @ (square_TE.sum(dim=-1, keepdim=True) * valid_TE)
    return (torch.diag(square_TE.sum(dim=0)) - cross_EE - cross_EE.T + outer_EE).double()
