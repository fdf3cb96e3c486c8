"""Computes the measures of an inspection from its sums, per layer and per expert; docs/measures.md defines them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..external.observe import ObservedRouter
from ..functional.metrics import maxvio, maxvio_noise_floor, mutual_information
from ..functional.specialization import information_bias, similarity
from ..storage.inspection_record import Arrays, DomainText, Inspection, InspectionFacts, Layer, Pair
from .accumulator import Accumulator
from .expert_similarity import weight_similarity
from .windows import Windows

__all__ = ["finalize"]

TOP_IDS = 8  # of every expert
SEEN_OFTEN = 10  # rarer token ids are left out (OLMoE, 2409.02060)
CONTEXT = 8  # tokens on each side of an example
ALIKE = 0.9  # cosine or correlation from which two experts count as alike
MOST_PAIRS = 20
IDLE = 0.1  # of the mean load


def finalize(network: nn.Module, accumulator: Accumulator, windows: Windows, show: Callable[[int], str],
             problems: Sequence[str], **facts: Any) -> Inspection:  # fmt: skip
    """The finished inspection. ``facts``: the fields of ``InspectionFacts`` that do not follow from the sums."""
    state = {name: tensor.cpu() for name, tensor in accumulator.state.items()}
    weights = [weight_similarity(network, one.name, one.num_experts) for one in accumulator.routers]
    arrays = _arrays(accumulator, state, windows, weights)
    layers = [_layer(accumulator, state, arrays, i, one) for i, one in enumerate(accumulator.routers)]
    tokens = [int(n) for n in state["tokens_D"]]
    seen_M = state["seen_M"]
    unsure = [f"{one.name}: its weights follow from no gate that is known; probabilities are those of softmax"
              for one in accumulator.routers if not one.gate_fits]  # fmt: skip
    used = {int(i) for array in (arrays.top_ids_LEJ, arrays.examples_LEJC, arrays.passage_ids_NS)
            for i in np.unique(array) if i >= 0}  # fmt: skip
    return Inspection(
        facts=InspectionFacts(sequence_length=windows.length, micro_batch=accumulator.sizes.micro_batch,
                    equal_windows=accumulator.sizes.equal_windows, tracked_ids=len(accumulator.tracked_M),
                    tracked_share=float(seen_M[:-1].sum() / seen_M.sum().clamp(min=1)), seed=accumulator.sizes.seed,
                    **facts),
        domains=[DomainText(*one) for one in zip(windows.domains, tokens, windows.windows, strict=True)],
        layers=layers,
        strings={i: show(i) for i in sorted(used)},
        arrays=arrays,
        problems=[*windows.problems, *unsure, *problems],
    )  # fmt: skip


def _arrays(
    accumulator: Accumulator, state: dict[str, Tensor], windows: Windows, weights: Sequence[Tensor | None]
) -> Arrays:
    tokens_D1 = state["tokens_D"].double().unsqueeze(-1)
    windows_D1 = torch.tensor(windows.windows, dtype=torch.float64).unsqueeze(-1)
    experts = state["pairs_LEE"].shape[-1]
    likeness = np.full((len(weights), experts, experts), np.nan, np.float32)
    for layer, found in enumerate(weights):
        if found is not None:
            likeness[layer, : len(found), : len(found)] = found
    total = tokens_D1.sum()
    mean_LE = state["probs_DLE"].sum(dim=0) / total
    routing = torch.stack([similarity(g / total, mean) for g, mean in zip(state["products_LEE"], mean_LE, strict=True)])
    top = _top_ids(accumulator, state)
    context, domain = _examples(state["example_place_LEJ"].numpy(), windows)
    passages, passage_domain, passage_experts = _passages(state["passages_NCLK"].numpy(), windows)
    saturation = torch.full(state["score_DL"].shape, torch.nan, dtype=torch.float64)
    if "shared_DL" in state:
        saturation = state["shared_DL"] / state["counts_DLE"].sum(dim=-1)
    return Arrays(
        counts_DLE=state["counts_DLE"].numpy(),
        equal_counts_DLE=state["equal_DLE"].numpy(),
        topk_score_DL=(state["score_DL"] / tokens_D1).numpy(),
        entropy_DL=(state["entropy_DL"] / tokens_D1).numpy(),
        probs_DLE=(state["probs_DLE"] / tokens_D1.unsqueeze(-1)).numpy(),
        maxvio_sequence_DL=(state["sequence_vio_DL"] / windows_D1).numpy(),
        maxvio_micro_batch_DL=(state["batch_vio_DL"] / state["batches_D"].clamp(min=1).unsqueeze(-1)).numpy(),
        coactivation_LEE=state["pairs_LEE"].numpy(),
        weight_similarity_LEE=likeness,
        routing_similarity_LEE=routing.float().numpy(),
        top_ids_LEJ=top[0],
        top_id_counts_LEJ=top[1],
        top_id_seen_LEJ=top[2],
        examples_LEJC=context,
        example_domain_LEJ=domain,
        passage_ids_NS=passages,
        passage_domain_N=passage_domain,
        passage_experts_NSLK=passage_experts,
        saturation_DL=saturation.numpy(),
    )


def _layer(accumulator: Accumulator, state: dict[str, Tensor], arrays: Arrays, i: int, one: ObservedRouter) -> Layer:
    sizes, E = accumulator.sizes, one.num_experts
    equal_DE, load_E = state["equal_DLE"][:, i, :E], state["counts_DLE"][:, i, :E].sum(dim=0)
    probs_E = torch.from_numpy(arrays.probs_DLE[:, i, :E]).mean(dim=0)  # domains have equal weight
    batch = min(sizes.micro_batch, max(sizes.windows))
    choices = float(load_E.sum() / state["tokens_D"].sum())  # of a token: K, or their mean where some use fewer
    numbers = {
        "maxvio_sequence": arrays.maxvio_sequence_DL[:, i].mean(),
        "maxvio_micro_batch": arrays.maxvio_micro_batch_DL[:, i].mean(),
        "maxvio_global": maxvio(equal_DE.sum(dim=0)),
        "noise_sequence": maxvio_noise_floor(sizes.length, choices, E),
        "noise_micro_batch": maxvio_noise_floor(sizes.length * batch, choices, E),
        "noise_global": maxvio_noise_floor(sizes.length * sizes.equal_windows * sizes.domains, choices, E),
        "entropy_token": arrays.entropy_DL[:, i].mean(),
        "entropy_mean": -torch.xlogy(probs_E, probs_E).sum(),
        "topk_score": arrays.topk_score_DL[:, i].mean(),
    }
    numbers |= dict(zip(("id_share", "id_share_chance"), _id_shares(accumulator, state, i, one), strict=True))
    return Layer(
        name=one.name,
        router=type(one.module).__name__,
        num_experts=E,
        top_k=one.top_k,
        gate=one.gate,
        dead=(load_E == 0).nonzero().view(-1).tolist(),
        idle=(load_E < IDLE * load_E.double().mean()).nonzero().view(-1).tolist(),
        alike_weights=_pairs(arrays.weight_similarity_LEE[i, :E, :E]),
        alike_routing=_pairs(arrays.routing_similarity_LEE[i, :E, :E]),
        **{name: float(value) for name, value in numbers.items()},
        **_information(sizes.equal_windows, state, i, E),
        **_saturation(state, arrays, i),
    )


def _information(windows: int, state: dict[str, Tensor], i: int, E: int) -> dict[str, float | None]:
    """None with one domain: there is nothing to compare."""
    counts_DE = state["equal_DLE"][:, i, :E]
    if len(counts_DE) < 2:
        return dict.fromkeys(("information", "information_corrected", "information_shuffled",
                              "information_shuffled_high"))  # fmt: skip
    value = float(mutual_information(counts_DE))
    shuffled_R = mutual_information(state["shuffled_RDLE"][:, :, i, :E])
    bias = float(information_bias(counts_DE, state["squares_DLE"][:, i, :E], windows))
    return {
        "information": value,
        "information_corrected": max(0.0, value - bias),
        "information_shuffled": float(shuffled_R.mean()),
        "information_shuffled_high": float(shuffled_R.max()),
    }


def _saturation(state: dict[str, Tensor], arrays: Arrays, i: int) -> dict[str, float]:
    if "shared_DL" not in state:
        return {}
    mine_E, other_E = state["counts_DLE"][:, i].sum(dim=0).double(), state["other_LE"][i].double()
    choices = mine_E.sum() / state["tokens_D"].sum()
    by_chance = choices * (mine_E / mine_E.sum() * other_E / other_E.sum()).sum()
    return {"saturation": float(arrays.saturation_DL[:, i].mean()), "saturation_chance": float(by_chance)}


def _ids_ME(accumulator: Accumulator, state: dict[str, Tensor], i: int) -> Tensor:
    """(M, E) choices of each expert by each tracked token id."""
    return state["ids_LME"][i].view(len(accumulator.tracked_M) + 1, -1)[:-1]


def _id_shares(accumulator: Accumulator, state: dict[str, Tensor], i: int, one: ObservedRouter) -> tuple[float, float]:
    """Fraction of choices that go to the K most usual experts of their token id, and to the K busiest experts."""
    often_ME = _ids_ME(accumulator, state, i)[state["seen_M"][:-1] >= SEEN_OFTEN].double()
    total = float(often_ME.sum())
    if total == 0:
        return 0.0, 0.0
    usual = often_ME.topk(one.top_k, dim=-1).values.sum()
    return float(usual) / total, float(often_ME.sum(dim=0).topk(one.top_k).values.sum()) / total


def _top_ids(accumulator: Accumulator, state: dict[str, Tensor]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(L, E, J) token ids that give an expert most of its load, how often they chose it, and how often they occur."""
    found = []
    tracked_M, seen_M = torch.from_numpy(accumulator.tracked_M), state["seen_M"][:-1]
    for i in range(len(accumulator.routers)):
        ids_EM = _ids_ME(accumulator, state, i).T
        counts_EJ, at_EJ = ids_EM.topk(min(TOP_IDS, ids_EM.shape[1]), dim=-1)
        none_EJ = counts_EJ == 0
        found.append((tracked_M[at_EJ].masked_fill(none_EJ, -1), counts_EJ, seen_M[at_EJ].masked_fill(none_EJ, 0)))
    ids, counts, seen = (torch.stack(column) for column in zip(*found, strict=True))
    return ids.int().numpy(), counts.long().numpy(), seen.numpy()


def _examples(place_LEJ: np.ndarray, windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """(L, E, J, C) token ids around each example, and its domain."""
    context = np.full((*place_LEJ.shape, 2 * CONTEXT + 1), -1, np.int32)
    domain = np.full(place_LEJ.shape, -1, np.int16)
    by_window: dict[tuple[int, int], list[tuple[Any, int]]] = {}
    for at in zip(*np.nonzero(place_LEJ >= 0), strict=True):
        place = int(place_LEJ[at])
        by_window.setdefault((place >> 56, place >> 24 & 0xFFFFFFFF), []).append((at, place & 0xFFFFFF))
    for (d, window), examples in by_window.items():
        ids_S = np.full(windows.length + 2 * CONTEXT, -1, np.int32)
        ids_S[CONTEXT:-CONTEXT] = windows.read(d, window, window + 1)[0]
        for at, position in examples:
            context[at], domain[at] = ids_S[position : position + 2 * CONTEXT + 1], d
    return context, domain


def _passages(experts_NCLK: np.ndarray, windows: Windows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids, domains and experts of the passages."""
    domains = len(windows.domains)
    per_domain, length = len(experts_NCLK) // domains, experts_NCLK.shape[1]
    there = [(d, w) for d in range(domains) for w in range(min(per_domain, windows.windows[d]))]
    ids = np.stack([windows.read(d, w, w + 1)[0, :length] for d, w in there]).astype(np.int32)
    rows = [d * per_domain + w for d, w in there]
    return ids, np.array([d for d, _ in there], np.int16), experts_NCLK[rows]


def _pairs(similarity_EE: np.ndarray) -> list[Pair]:
    """Pairs of similar experts, the most similar first."""
    first, second = np.nonzero(np.triu(np.nan_to_num(similarity_EE) >= ALIKE, 1))
    pairs = [Pair(int(a), int(b), float(similarity_EE[a, b])) for a, b in zip(first, second, strict=True)]
    return sorted(pairs, key=lambda pair: -pair.similarity)[:MOST_PAIRS]
