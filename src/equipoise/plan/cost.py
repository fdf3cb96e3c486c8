"""Seconds and bytes of one optimizer step: the work of every rank, and the time that the slowest rank adds.

One micro-batch and layer takes F * (expert matmuls + four all-to-alls), where F is the straggler factor: all ranks of a
group wait for the slowest one. Groups wait for each other at every all-reduce over all ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from ..report.data.order_statistics import expected_max
from .cluster import Cluster
from .straggler import Straggler

__all__ = ["Memory", "StepTime", "Work", "memory", "step_time", "sum_seconds", "work"]

FLOPS = 6.0  # per parameter and token: 2 forward, 4 backward
STEP_BYTES, COUNT_BYTES = 17, 8  # per layer and expert, of the all-reduce of a step and of a micro-batch
INSIDE_US = 1.2  # a hop inside a node


@dataclass(frozen=True)
class Work:
    """Seconds of one micro-batch on a rank with the mean load: all layers, forward and backward."""

    dense: float
    experts: float
    all_to_all: float

    @property
    def waited(self) -> float:
        """The part that scales with the slowest rank."""
        return self.experts + self.all_to_all


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step by cause; ``total`` is their sum."""

    dense: float
    experts: float  # with even load
    all_to_all: float  # with even load
    straggler: float  # ranks of a group wait for the slowest
    groups: float  # groups wait for the slowest group
    balance_sums: float  # all-reduces of the balancer
    gradients: float  # the part of their all-reduce that backward does not hide

    @property
    def total(self) -> float:
        return (self.dense + self.experts + self.all_to_all + self.straggler + self.groups + self.balance_sums
                + self.gradients)  # fmt: skip


@dataclass(frozen=True)
class Memory:
    """Bytes of activations of routed experts, on a rank with the mean load and on the fullest rank."""

    even: float
    fullest: float


def work(c: Cluster) -> Work:
    """Matmuls at the reached fraction of the peak; all-to-alls at the slower of the two links, which work in parallel.

    >>> one = work(Cluster())
    >>> one.experts > 0 and work(Cluster(tflops=2 * 989.0)).experts == one.experts / 2
    True
    """
    per_second = c.tflops * 1e12 * c.efficiency
    passes = FLOPS * (4 / 3 if c.recompute else 1)
    attention = c.layers * c.attention_width * c.sequence  # causal scores and values, as FLOPs per parameter
    dense = c.dense_ms / 1e3 or c.tokens * passes * (c.dense_parameters + attention) / per_second
    experts = c.tokens * c.top_k * c.layers * passes * c.expert_parameters / per_second
    exchanges = (4 + 2 * c.recompute) * c.layers * (1 - c.overlap)
    return Work(dense, experts, exchanges * _all_to_all(c))


def _all_to_all(c: Cluster) -> float:
    """Seconds to send the vector of every pair to a rank of its expert; of R ranks, R - n are on other nodes."""
    near = min(c.ep, c.gpus_per_node)
    nodes = -(-c.ep // c.gpus_per_node)
    vector = c.tokens * c.width * c.activation_bytes / (c.link_efficiency * 1e9)
    inside = vector * c.top_k * (near - 1) / c.ep / c.intra_gb_s
    outside = vector * c.top_k * (c.ep - near) / c.ep / c.inter_gb_s
    if c.once_per_node and nodes > 1:  # once to each node among top_k random choices, then on to each expert
        outside = vector * (nodes - 1) * (1 - (1 - 1 / nodes) ** c.top_k) / c.inter_gb_s
        inside = vector * c.top_k * (near - 1) / near / c.intra_gb_s
    return max(inside, outside) + (c.latency_us * 1e-6 if c.ep > 1 else 0.0)


def sum_seconds(c: Cluster, number: float, ranks: int) -> float:
    """Seconds of an all-reduce of ``number`` bytes over ``ranks``, up and down a binary tree of nodes.

    >>> sum_seconds(Cluster(), 1e6, 1), round(1e3 * sum_seconds(Cluster(), 1e6, 4096), 2)
    (0.0, 0.23)
    """
    if ranks == 1:
        return 0.0
    nodes = max(1, -(-ranks // c.gpus_per_node))
    inside = min(ranks, c.gpus_per_node) - 1
    hops = 2 * (inside * INSIDE_US + math.ceil(math.log2(nodes)) * c.hop_us)
    link = c.inter_gb_s if nodes > 1 else c.intra_gb_s
    return (c.latency_us + hops) * 1e-6 + 2 * number / (link * 1e9 * c.link_efficiency)


def step_time(c: Cluster, factor: Straggler, *, counts: bool) -> StepTime:
    """Seconds of one optimizer step.

    ``counts``: the strategy needs the loads of all ranks within the step (a global loss). Then all groups wait for the
    slowest at every all-reduce. The waits of n layers and micro-batches between two of them have a sum with standard
    deviation sqrt(n) * spread, of which the largest over the groups counts.
    """
    one, summed_at = work(c), _summed_at(c) if counts else []
    per_layer = one.waited / c.layers
    times = len(summed_at) * (c.layers if c.sync == "layer" else 1)
    # a loss that all-reduces by layer needs f at the start of backward: groups synchronize once per micro-batch
    stretches = [end - start for start, end in pairwise([0, *summed_at, c.micro_batches])]
    between = sum(math.sqrt(n * c.layers) for n in stretches) * factor.spread * expected_max(c.groups)
    small = COUNT_BYTES * c.experts * (1 if c.sync == "layer" else c.layers)
    return StepTime(
        dense=c.micro_batches * one.dense,
        experts=c.micro_batches * one.experts,
        all_to_all=c.micro_batches * one.all_to_all,
        straggler=c.micro_batches * one.waited * (factor.mean - 1),
        groups=per_layer * between,
        balance_sums=times * sum_seconds(c, small, c.gpus) + sum_seconds(c, STEP_BYTES * c.experts * c.layers, c.gpus),
        gradients=_gradients(c),
    )


def _summed_at(c: Cluster) -> list[int]:
    """The micro-batches of a step, from 1 on, after whose forward a global loss all-reduces its counts."""
    if c.sync == "step":
        return []
    if c.sync == "doubling":
        return [1 << power for power in range(c.micro_batches.bit_length())]
    return list(range(1, c.micro_batches + 1))


def _gradients(c: Cluster) -> float:
    """Ring all-reduces: dense parameters over all ranks, an expert over the ranks that hold a copy of it.

    A ring enters a node once per rank there, each time over another link.
    """

    def ring(parameters: float, ranks: int, apart: int) -> float:
        link = c.intra_gb_s
        if ranks * apart > c.gpus_per_node:
            link = min(link, c.inter_gb_s * max(1, c.gpus_per_node // apart))
        return 2 * (ranks - 1) / ranks * parameters * c.gradient_bytes / (link * 1e9 * c.link_efficiency)

    held = c.layers * c.experts_per_rank * c.expert_parameters
    seconds = ring(c.dense_parameters, c.gpus, 1) + ring(held, c.groups * c.replicas, c.parts)
    return (1 - c.overlap_gradients) * seconds


def memory(c: Cluster, factor: Straggler) -> Memory:
    """Input, gate, up, their product and the output of every pair, of all layers or, with ``recompute``, of one.

    The surplus of the fullest rank grows with sqrt(layers), since a rank is rarely the fullest in every layer.
    """
    alive = 1 if c.recompute else c.layers
    pair = c.activation_bytes * (2 * c.width + 3 * c.expert_hidden)
    even = c.tokens * c.top_k * pair * alive
    if c.recompute:  # the largest F of a step
        most = factor.mean + factor.spread * expected_max(c.layers * c.micro_batches * c.groups)
    else:
        most = 1 + factor.rank_spread / math.sqrt(c.layers) * expected_max(c.gpus * c.micro_batches)
    return Memory(even, even * max(1.0, most))
