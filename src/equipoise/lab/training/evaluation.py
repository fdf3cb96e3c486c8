"""Evaluation on held-out text: loss and bits per byte per domain, load balance and specialization of the experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...distributed import ALONE, Group
from ...errors import DataError
from ...external.observe import Choices, ObservedRouter, capture, find_routers
from ...functional.metrics import dead_experts, maxvio, mutual_information
from ...functional.routing import count_choices, gate_probs
from ...functional.routing_mask import frequency_class
from ...storage.run_record import Evaluation
from .routing_churn import LastRouting, every_token, ids_dtype

if TYPE_CHECKING:
    from ..data.packing import PackedData
    from ..models.protocol import TrainableLM

__all__ = ["evaluate", "shuffled_mutual_information"]

PASS_TOKENS = 4096  # that run together
FREQUENCY_CLASSES = 10  # of token ids, each with a tenth of the training text's tokens
SHUFFLES = 8  # of the domain labels; their mean is the floor of the mutual information


@torch.no_grad()
def evaluate(
    model: TrainableLM,
    data: PackedData,
    *,
    step: int,
    sequences: int = 0,
    sequences_per_micro_batch: int = 4,
    mix: str = "micro_batch",
    seed: int = 0,
    group: Group = ALONE,
    last: LastRouting | None = None,
) -> Evaluation:
    """Runs held-out sequences in evaluation mode, without gradient: the first ``sequences`` of each domain (0 = all).

    All balance numbers use equally many sequences of each domain. Micro-batches are made as in training: one domain
    each (``mix`` "micro_batch"), or dealt out in turn ("sequence"). ``seed`` is of the shuffled domain labels. The
    ranks of ``group`` share the micro-batches; all get all results. ``last`` knows what the evaluation of this text
    before this one chose, and is told what this one did.
    Raises DataError where a domain has no held-out sequence.
    """
    labels_N, tokens_NS = _take(data, sequences, mix)
    batches = tokens_NS.split(max(1, PASS_TOKENS // tokens_NS.shape[1]))
    every = every_token(len(labels_N) * (tokens_NS.shape[1] - 1))
    class_V = frequency_class(torch.from_numpy(data.frequencies), FREQUENCY_CLASSES)
    loss_N, sums_N2C, counts_NLE, score_NL, ids_NLSK = _measured(model, batches, group, every, class_V)

    domains = range(len(data.domains))
    fair_N = _equal(labels_N, len(data.domains))
    fair_NLE, fair_labels_N = counts_NLE[fair_N], labels_N[fair_N]
    total_LE = fair_NLE.sum(dim=0)
    loss = {name: loss_N[labels_N == d].mean().item() for d, name in enumerate(data.domains)}
    return Evaluation(
        step=step,
        loss=loss,
        bits_per_byte={name: nats / math.log(2) * _tokens_per_byte(data, name) for name, nats in loss.items()},
        tokens={name: int((labels_N == d).sum()) * (tokens_NS.shape[1] - 1) for d, name in enumerate(data.domains)},
        counts=[counts_NLE[labels_N == d].sum(dim=0).tolist() for d in domains],
        topk_score=[score_NL[labels_N == d].mean(dim=0).tolist() for d in domains],
        maxvio_sequence=maxvio(fair_NLE).mean(dim=0).tolist(),
        maxvio_micro_batch=_micro_batch_maxvio(
            [fair_NLE[fair_labels_N == d] for d in domains] if mix == "micro_batch" else [fair_NLE],
            sequences_per_micro_batch,
        ),
        maxvio_global=maxvio(total_LE).tolist(),
        dead_experts=dead_experts(total_LE).long().tolist(),
        mutual_information=mutual_information(_by_domain(fair_NLE, fair_labels_N).movedim(0, -2)).tolist(),
        mutual_information_shuffled=shuffled_mutual_information(fair_NLE, fair_labels_N, seed=seed),
        routing_churn=(last or LastRouting()).churn(ids_NLSK[fair_N], counts_NLE.shape[-1]),
        loss_by_frequency=_by_frequency(sums_N2C.sum(dim=0), class_V[tokens_NS]),
    )


def shuffled_mutual_information(counts_NLE: Tensor, labels_N: Tensor, *, seed: int = 0) -> list[float]:
    """Mutual information per layer (nats) with domain labels permuted over the sequences: the noise floor.

    Whole sequences are relabelled, because tokens of one sequence use similar experts in any domain.

    >>> counts_NLE = torch.tensor([[[9, 1]], [[9, 1]], [[1, 9]], [[1, 9]]])
    >>> shuffled_mutual_information(counts_NLE, torch.tensor([0, 0, 1, 1]))[0] < 0.37  # 0.368 with the true labels
    True
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(SHUFFLES):
        shuffled_N = labels_N[torch.randperm(len(labels_N), generator=generator)]
        values.append(mutual_information(_by_domain(counts_NLE, shuffled_N).movedim(0, -2)))
    return torch.stack(values).mean(dim=0).tolist()


def _measured(
    model: TrainableLM, batches: Sequence[Tensor], group: Group, every: int, class_V: Tensor
) -> tuple[Tensor, ...]:
    """Of every sequence: loss (N,), loss summed by the class of what is read and predicted (N, 2, C), counts (N, L, E),
    score (N, L), and of each so many-th token ids (N, L, ., K)."""
    device = next(model.parameters()).device
    routers = find_routers(model, lambda: model.hidden(batches[0][:1, :-1].to(device)))
    results: list[tuple[Tensor, ...]] = []
    was_training = model.training
    model.eval()
    try:
        with capture(routers) as seen:
            for turn in range(0, len(batches), group.size):
                # with expert parallelism all ranks run equally often: what is left over runs twice, counts once
                batch = batches[min(turn + group.rank, len(batches) - 1)].to(device)
                loss_BS = model.token_losses(batch[:, :-1], batch[:, 1:]).double()
                found = (
                    loss_BS.mean(dim=1),
                    _class_sums(loss_BS, class_V.to(device)[batch]),
                    _sequence_counts(seen, routers, len(batch)),
                    _sequence_scores(seen, routers, len(batch)),
                    _sequence_ids(seen, routers, len(batch), every),
                )
                results.append(_of_all(found, [len(b) for b in batches[turn : turn + group.size]], group))
    finally:
        model.train(was_training)
    return tuple(torch.cat(column).cpu() for column in zip(*results, strict=True))


def _of_all(found: tuple[Tensor, ...], sizes: list[int], group: Group) -> tuple[Tensor, ...]:
    """What each rank found, in their order; ``sizes`` are the sequences of those whose result counts."""
    if group.size == 1:
        return found
    start = sum(sizes[: group.rank])
    whole = []
    for tensor in found:
        rows = tensor.new_zeros(sum(sizes), *tensor.shape[1:])
        if group.rank < len(sizes):
            rows[start : start + len(tensor)] = tensor
        whole.append(group.sum(rows))
    return tuple(whole)


def _take(data: PackedData, limit: int, mix: str) -> tuple[Tensor, Tensor]:
    """(domain of each sequence, its S + 1 tokens), in the order of evaluation."""
    chosen = []
    for domain, name in enumerate(data.domains):
        rows = data.heldout[name]
        if len(rows) == 0:
            raise DataError(expected=f"held-out text of the domain {name!r}", got="no whole sequence",
                            do="give the domain more text, or lower data.sequence_length")  # fmt: skip
        chosen += [(place, domain) for place in range(min(limit or len(rows), len(rows)))]
    if mix == "sequence":
        chosen.sort()
    tokens = [torch.from_numpy(data.heldout[data.domains[domain]][place].astype("int64")) for place, domain in chosen]
    return torch.tensor([domain for _, domain in chosen]), torch.stack(tokens)


def _equal(labels_N: Tensor, num_domains: int) -> Tensor:
    """Marks the first n sequences of each domain, n being what the smallest one has."""
    place_N = torch.zeros_like(labels_N)
    for domain in range(num_domains):
        mine_N = labels_N == domain
        place_N[mine_N] = torch.arange(int(mine_N.sum()))
    return place_N < torch.bincount(labels_N, minlength=num_domains).min()


def _class_sums(loss_BS: Tensor, classes_BS1: Tensor) -> Tensor:
    """(B, 2, C) nats of each sequence by the class of the input and of the target; ``classes_BS1`` (B, S + 1)."""
    sums_B2C = loss_BS.new_zeros(len(loss_BS), 2, FREQUENCY_CLASSES)
    classes_B2S = torch.stack([classes_BS1[:, :-1], classes_BS1[:, 1:]], dim=1)
    return sums_B2C.scatter_add_(2, classes_B2S, loss_BS.unsqueeze(1).expand_as(classes_B2S))


def _by_frequency(sums_2C: Tensor, classes_NS1: Tensor) -> dict[str, list[float]]:
    """Nats per token of each class."""
    sides = {"input": classes_NS1[:, :-1], "target": classes_NS1[:, 1:]}
    counts = [torch.bincount(classes_NS.flatten(), minlength=FREQUENCY_CLASSES) for classes_NS in sides.values()]
    return {name: (sum_C / n_C).tolist() for name, sum_C, n_C in zip(sides, sums_2C, counts, strict=True)}


def _sequence_counts(seen: Mapping[str, Choices], routers: Sequence[ObservedRouter], num_sequences: int) -> Tensor:
    """(sequences, layers, experts) choices."""
    counts = []
    for router in routers:
        ids_TK, choices = seen[router.name].ids_TK, router.num_experts + router.idle
        counts.append(count_choices(ids_TK, choices, num_sequences=num_sequences)[:, : router.num_experts])
    return torch.stack(counts, dim=1)


def _sequence_scores(seen: Mapping[str, Choices], routers: Sequence[ObservedRouter], num_sequences: int) -> Tensor:
    """(sequences, layers) mean over tokens of the gate probability that the K chosen experts have together."""
    scores = []
    for router in routers:
        logits_TE, ids_TK = seen[router.name]
        probs_TE = gate_probs(logits_TE, router.gate)
        chosen_TK = probs_TE.gather(-1, ids_TK.clamp(max=probs_TE.shape[-1] - 1) if router.drops else ids_TK)
        if router.drops:
            chosen_TK = chosen_TK.where(ids_TK < probs_TE.shape[-1], 0)
        scores.append(chosen_TK.sum(dim=-1).view(num_sequences, -1).double().mean(dim=1))
    return torch.stack(scores, dim=1)


def _sequence_ids(
    seen: Mapping[str, Choices], routers: Sequence[ObservedRouter], num_sequences: int, every: int
) -> Tensor:
    """(sequences, layers, tokens, K)"""
    dtype = ids_dtype(max(router.num_experts + router.idle + router.drops for router in routers))
    ids = [seen[router.name].ids_TK.unflatten(0, (num_sequences, -1))[:, ::every].to(dtype) for router in routers]
    return torch.stack(ids, dim=1)


def _by_domain(counts_NLE: Tensor, labels_N: Tensor) -> Tensor:
    num_domains = int(labels_N.max()) + 1
    return counts_NLE.new_zeros(num_domains, *counts_NLE.shape[1:]).index_add_(0, labels_N, counts_NLE)


def _micro_batch_maxvio(streams: Sequence[Tensor], size: int) -> list[float]:
    """Mean over the micro-batches of ``size`` neighbours in each stream (N, L, E); a shorter rest is left out."""
    groups = [group for stream in streams for group in stream.split(size)]
    whole = [group for group in groups if len(group) == size] or groups
    return maxvio(torch.stack([group.sum(dim=0) for group in whole])).mean(dim=0).tolist()


def _tokens_per_byte(data: PackedData, domain: str) -> float:
    rows = data.heldout[domain]
    return rows.shape[0] * (rows.shape[1] - 1) / data.heldout_bytes[domain]
