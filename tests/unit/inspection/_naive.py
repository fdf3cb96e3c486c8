"""Every measure of docs/measures.md written out as loops over tokens in float64; imports nothing from equipoise."""

from __future__ import annotations

import math
import statistics
from collections import Counter, defaultdict
from typing import Any

__all__ = ["Token", "measures", "probabilities", "shuffled_labels"]

Token = dict[str, Any]  # domain, window, position, id, and per layer: logits, choices, gate


def probabilities(logits: list[float], gate: str) -> list[float]:
    if gate == "softmax":
        high = max(logits)
        scores = [math.exp(z - high) for z in logits]
    elif gate == "sigmoid":
        scores = [1 / (1 + math.exp(-z)) for z in logits]
    else:
        scores = [math.sqrt(math.log1p(math.exp(z))) for z in logits]
    return [s / sum(scores) for s in scores]


def maxvio(counts: list[int]) -> float:
    return max(counts) / (sum(counts) / len(counts)) - 1


def information(counts: list[list[int]]) -> float:
    """Of expert and domain, from the joint distribution in which every domain weighs the same."""
    joint = [[c / sum(row) / len(counts) for c in row] for row in counts]
    of_expert = [sum(column) for column in zip(*joint, strict=True)]
    return sum(p * math.log(p / (of_expert[e] * sum(row))) for row in joint for e, p in enumerate(row) if p > 0)


def bias(windows: dict[int, list[list[int]]], experts: int) -> float:
    """``windows``: domain -> the counts of each of its windows."""
    shares, variances = [], []
    for counts in windows.values():
        total = sum(map(sum, counts))
        shares.append([sum(w[e] for w in counts) / total for e in range(experts)])
        variances.append([len(counts) * statistics.variance([w[e] for w in counts]) / total**2 for e in range(experts)])
    domains = len(shares)
    within = sum(v / f for vs, fs in zip(variances, shares, strict=True) for v, f in zip(vs, fs, strict=True) if f)
    together = 0.0
    for e in range(experts):
        f = sum(fs[e] for fs in shares) / domains
        if f:
            together += sum(vs[e] for vs in variances) / domains**2 / f
    return (within / domains - together) / 2


def correlation(one: list[float], other: list[float]) -> float:
    return statistics.correlation(one, other)


def measures(tokens: list[Token], layer: int, *, experts: int, top_k: int, micro_batch: int, equal: int,
             tracked: list[int]) -> dict[str, Any]:  # fmt: skip
    """Everything about one layer. ``equal`` windows of each domain enter what compares domains."""
    domains = sorted({t["domain"] for t in tokens})
    counts = [[0] * experts for _ in domains]
    equal_counts = [[0] * experts for _ in domains]
    by_window: dict[int, dict[int, list[int]]] = {d: defaultdict(lambda: [0] * experts) for d in domains}
    pairs = [[0] * experts for _ in range(experts)]
    entropy: dict[int, list[float]] = defaultdict(list)
    score: dict[int, list[float]] = defaultdict(list)
    probs: list[list[float]] = []
    mean_probs = {d: [0.0] * experts for d in domains}
    by_id: dict[int, Counter[int]] = defaultdict(Counter)
    number = Counter(t["domain"] for t in tokens)
    seen_ids: Counter[int] = Counter()
    for t in tokens:
        logits, chosen = t["logits"][layer], t["choices"][layer]
        p = probabilities(logits, t["gate"][layer])
        d = t["domain"]
        probs.append(p)
        entropy[d].append(-sum(x * math.log(x) for x in p if x > 0))
        score[d].append(sum(p[e] for e in chosen))
        seen_ids[t["id"]] += 1
        for e in range(experts):
            mean_probs[d][e] += p[e] / number[d]
        for e in chosen:
            counts[d][e] += 1
            by_window[d][t["window"]][e] += 1
            by_id[t["id"]][e] += 1
            if t["window"] < equal:
                equal_counts[d][e] += 1
            for other in chosen:
                pairs[e][other] += 1
    batches = {}
    for d in domains:
        order = [by_window[d][w] for w in sorted(by_window[d])]
        size = min(micro_batch, len(order))
        groups = [order[i : i + size] for i in range(0, len(order) - size + 1, size)]
        batches[d] = statistics.fmean(maxvio([sum(w[e] for w in g) for e in range(experts)]) for g in groups)
    columns = list(zip(*probs, strict=True))
    often = [i for i in tracked if seen_ids[i] >= 10]
    total = sum(sum(by_id[i].values()) for i in often)
    together = Counter[int]()
    for i in often:
        together.update(by_id[i])
    mean_p = [statistics.fmean(mean_probs[d][e] for d in domains) for e in range(experts)]
    fair = {d: [by_window[d][w] for w in sorted(by_window[d])[:equal]] for d in domains}
    load = [sum(row[e] for row in counts) for e in range(experts)]
    return {
        "counts": counts,
        "equal_counts": equal_counts,
        "pairs": pairs,
        "by_id": by_id,
        "seen": seen_ids,
        "entropy": [statistics.fmean(entropy[d]) for d in domains],
        "score": [statistics.fmean(score[d]) for d in domains],
        "mean_probs": [mean_probs[d] for d in domains],
        "maxvio_sequence": [statistics.fmean(map(maxvio, by_window[d].values())) for d in domains],
        "maxvio_micro_batch": [batches[d] for d in domains],
        "maxvio_global": maxvio([sum(row[e] for row in equal_counts) for e in range(experts)]),
        "information": information(equal_counts) if len(domains) > 1 else None,
        "bias": bias(fair, experts) if len(domains) > 1 and equal > 1 else 0.0,
        "windows": by_window,
        "entropy_mean": -sum(p * math.log(p) for p in mean_p if p > 0),
        "correlation": [[correlation(a, b) for b in columns] for a in columns],
        "id_share": sum(sum(c for _, c in by_id[i].most_common(top_k)) for i in often) / total if total else 0.0,
        "id_share_chance": sum(c for _, c in together.most_common(top_k)) / total if total else 0.0,
        "dead": [e for e in range(experts) if load[e] == 0],
        "idle": [e for e in range(experts) if load[e] < 0.1 * sum(load) / experts],
    }


def shuffled_labels(counts: dict[int, dict[int, list[int]]], dealt: dict[tuple[int, int], int]) -> list[list[int]]:
    """Counts by dealt label; ``dealt`` is (domain, window) -> label."""
    experts = len(next(iter(next(iter(counts.values())).values())))
    sums = [[0] * experts for _ in counts]
    for (d, w), label in dealt.items():
        for e in range(experts):
            sums[label][e] += counts[d][w][e]
    return sums
