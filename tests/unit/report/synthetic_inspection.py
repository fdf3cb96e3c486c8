"""A plausible inspection without a model: numbers shaped like those of a real one, consistent with each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from equipoise.storage.inspection_record import Arrays, DomainText, Inspection, InspectionFacts, Layer, Pair

DOMAINS = ["python", "english", "cpp", "json", "french", "maths", "law", "latex", "chat", "wiki", "chinese", "smiles"]
WORDS = [" the", " of", "(", ")", " return", "=", "self", " α", "<b>", "&amp;", "\n", "\t", " 0", "}", "Ġx", "'", '"']


def synthetic_inspection(
    *,
    domains: int = 3,
    layers: int = 3,
    experts: int = 16,
    top_k: int = 2,
    sharpness: float = 0.8,
    against: bool = False,
    passages: int = 2,
    passage_length: int = 64,
    seed: int = 0,
    model: str = "models/tiny-moe",
    names: list[str] | None = None,
) -> Inspection:
    """``sharpness`` is how far domains differ in their experts; ``names`` replaces the domains' names."""
    draw = np.random.default_rng(seed)
    names = names or [DOMAINS[d % len(DOMAINS)] + "2" * (d // len(DOMAINS)) for d in range(domains)]
    D, L, E, K, J, C = len(names), layers, experts, top_k, 6, 17
    tokens = 32_768
    share_DLE = np.exp(sharpness * draw.standard_normal((D, L, E)))
    share_DLE /= share_DLE.sum(-1, keepdims=True)
    counts_DLE = np.floor(share_DLE * tokens * K).astype(np.int64)
    counts_DLE[..., 0] += tokens * K - counts_DLE.sum(-1)
    if E > 4:
        counts_DLE[:, -1, 1] += counts_DLE[:, -1, 3]
        counts_DLE[:, -1, 3] = 0  # a dead expert
    load_LE = counts_DLE.sum(0)
    product = load_LE[:, :, None] * load_LE[:, None, :] * np.exp(0.3 * draw.standard_normal((L, E, E)))
    product = (product + product.transpose(0, 2, 1)) * (1 - np.eye(E))
    pairs = product / product.sum((1, 2), keepdims=True) * D * tokens * K * (K - 1)
    coactivation = pairs.astype(np.int64) + np.eye(E, dtype=np.int64) * load_LE[:, :, None]
    similarity = np.clip(0.1 * draw.standard_normal((2, L, E, E)), -1, 1).astype(np.float32)
    similarity = (similarity + similarity.transpose(0, 1, 3, 2)) / 2
    similarity[..., range(E), range(E)] = 1
    top_ids = draw.integers(0, len(WORDS), (L, E, J)).astype(np.int32)
    seen = draw.integers(50, 2000, (L, E, J))
    passage_domain = np.repeat(np.arange(D), passages).astype(np.int16)
    passage_experts = np.stack(
        [np.stack([draw.choice(E, (passage_length,), p=share_DLE[d, l]) for l in range(L)], 1) for d in passage_domain]
    )[..., None]
    passage_experts = (passage_experts + np.arange(K)) % E
    arrays = Arrays(
        counts_DLE=counts_DLE,
        equal_counts_DLE=counts_DLE,
        topk_score_DL=draw.uniform(K / E, 0.8, (D, L)),
        entropy_DL=draw.uniform(0.5, math.log(E), (D, L)),
        probs_DLE=counts_DLE / (tokens * K),
        maxvio_sequence_DL=draw.uniform(1, 3, (D, L)),
        maxvio_micro_batch_DL=draw.uniform(0.5, 2, (D, L)),
        coactivation_LEE=coactivation,
        weight_similarity_LEE=similarity[0],
        routing_similarity_LEE=similarity[1],
        top_ids_LEJ=top_ids,
        top_id_counts_LEJ=(seen * draw.uniform(0.2, 1, (L, E, J))).astype(np.int64),
        top_id_seen_LEJ=seen,
        examples_LEJC=draw.integers(-1, len(WORDS), (L, E, J, C)).astype(np.int32),
        example_domain_LEJ=draw.integers(0, D, (L, E, J)).astype(np.int16),
        passage_ids_NS=draw.integers(0, len(WORDS), (len(passage_domain), passage_length)).astype(np.int32),
        passage_domain_N=passage_domain,
        passage_experts_NSLK=passage_experts.astype(np.int16),
        saturation_DL=draw.uniform(0.5, 1, (D, L)) if against else np.full((D, L), np.nan),
    )
    facts = InspectionFacts(
        model=model, family="qwen3_moe", data="the text of this installation",
        against="models/early" if against else None,
        device="cpu", dtype="float32", created="2026-01-31T12:00:00+00:00", seconds=61.5, sequence_length=512,
        micro_batch=4, equal_windows=tokens // 512, tracked_ids=2048, tracked_share=0.93, seed=0,
        versions={"equipoise": "0.1.0", "torch": "2.13.0"},
    )  # fmt: skip
    return Inspection(
        facts=facts,
        domains=[DomainText(name, tokens, tokens // 512) for name in names],
        layers=[_layer(i, arrays, E, K, several=D > 1, against=against) for i in range(L)],
        strings=dict(enumerate(WORDS)),
        arrays=arrays,
    )


def synthetic_checkpoints(steps: Sequence[int], model: str = "models/tiny", **more: Any) -> list[Inspection]:
    """Checkpoints of one model: the same text, experts that specialize, and choices of which some change each time."""
    made: list[Inspection] = []
    for number, step in enumerate(steps):
        name, sharpness = f"{model}/checkpoint-{step}", 0.2 + 0.3 * number
        one = synthetic_inspection(model=name, sharpness=sharpness, seed=number, **more)
        if made:
            before = made[-1].arrays
            stays = np.random.default_rng(number).random((*before.passage_experts_NSLK.shape[:3], 1)) < 0.8
            experts = np.where(stays, before.passage_experts_NSLK, one.arrays.passage_experts_NSLK)
            arrays = replace(one.arrays, passage_ids_NS=before.passage_ids_NS, passage_experts_NSLK=experts)
            one = replace(one, arrays=arrays)
        made.append(one)
    return made


def _layer(i: int, arrays: Arrays, E: int, K: int, *, several: bool, against: bool) -> Layer:
    load = arrays.counts_DLE[:, i].sum(0)
    given = arrays.counts_DLE[:, i] / arrays.counts_DLE[:, i].sum(-1, keepdims=True)
    mean = given.mean(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        information = float(np.nansum(given * np.log(given / mean)) / len(given))
    dead = np.flatnonzero(load == 0).tolist()
    more: dict[str, Any] = {"saturation": 0.7, "saturation_chance": K / E} if against else {}
    return Layer(
        name=f"model.layers.{i}.mlp.gate", router="Qwen3MoeTopKRouter", num_experts=E, top_k=K, gate="softmax",
        maxvio_sequence=float(arrays.maxvio_sequence_DL[:, i].mean()),
        maxvio_micro_batch=float(arrays.maxvio_micro_batch_DL[:, i].mean()),
        maxvio_global=float(load.max() / load.mean() - 1), noise_sequence=0.4, noise_micro_batch=0.2,
        noise_global=0.02, dead=dead, idle=np.flatnonzero(load < 0.1 * load.mean()).tolist(),
        information=information if several else None, information_corrected=information * 0.98 if several else None,
        information_shuffled=0.004 if several else None, information_shuffled_high=0.006 if several else None,
        entropy_token=1.2, entropy_mean=2.5, topk_score=float(arrays.topk_score_DL[:, i].mean()),
        id_share=0.6, id_share_chance=0.2, alike_weights=[Pair(0, 1, 0.97)], alike_routing=[Pair(2, 4, 0.91)], **more,
    )  # fmt: skip
