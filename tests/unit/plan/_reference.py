"""What `plan` computes, by enumeration and plain loops; imports nothing from equipoise."""

from __future__ import annotations

import itertools
import math

import numpy as np


def expected_factor(pairs: int, parts: int) -> float:
    """E[largest / mean] when every pair picks one of the parts at random: all assignments, one by one."""
    total = 0.0
    for choice in itertools.product(range(parts), repeat=pairs):
        total += max(choice.count(part) for part in range(parts)) / (pairs / parts)
    return total / parts**pairs


def factor(loads: list[float]) -> float:
    return max(loads) / (sum(loads) / len(loads))


def part_loads(counts_E, parts: int, replicas: int = 1, placement: str = "contiguous") -> list[float]:
    """Load of every set of experts, each rank that holds it taking an equal share."""
    each = len(counts_E) // parts
    loads = [0.0] * parts
    for expert, count in enumerate(counts_E):
        part = expert // each if placement == "contiguous" else expert % parts
        loads[part] += count / replicas
    return loads


def bootstrap_factor(counts_MLE, ranks: int, parts: int) -> float:
    """E over all ways that `ranks` ranks draw recorded micro-batches, scaled to the same tokens."""
    micro_batches, layers, _ = counts_MLE.shape
    total, ways = 0.0, 0
    for drawn in itertools.product(range(micro_batches), repeat=ranks):
        for layer in range(layers):
            summed = sum(counts_MLE[m, layer] / counts_MLE[m, layer].sum() for m in drawn)
            total += factor(part_loads(list(summed), parts))
            ways += 1
    return total / ways


def largest_normal(n: int) -> float:
    """Mean of the largest of n standard normal numbers, by integrating x d(Phi(x)^n)."""
    x = np.linspace(-9, 9, 200_001)
    phi = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x[::100]])
    phi = np.interp(x, x[::100], phi)
    middle = (x[1:] + x[:-1]) / 2
    return float((middle * np.diff(phi**n)).sum())


def exchange_seconds(ranks: int, per_node: int, vectors: float, size: float, intra: float, inter: float) -> float:
    """The slower link of rank 0, which sends its vectors evenly to all ranks; bytes per second."""
    inside = sum(vectors * size / ranks for other in range(1, ranks) if other // per_node == 0)
    outside = sum(vectors * size / ranks for other in range(ranks) if other // per_node != 0)
    return max(inside / intra, outside / inter)


def nodes_reached(nodes: int, top_k: int) -> float:
    """Mean number of other nodes that a token of node 0 has to reach: all choices, one by one."""
    total = 0
    for choice in itertools.product(range(nodes), repeat=top_k):
        total += len(set(choice) - {0})
    return total / nodes**top_k
