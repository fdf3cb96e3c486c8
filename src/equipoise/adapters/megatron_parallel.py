"""Megatron-core: which ranks route which tokens, what its schedule divides a loss by, and what is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..distributed import Group, Ranks
from ..errors import ConfigError

__all__ = ["check_limits", "ranks_of", "tokens_of"]


def ranks_of(config: Any) -> Ranks:
    """Tensor-parallel ranks route other parts of the same sequences: every MoE layer needs sequence parallelism."""
    state = importlib.import_module("megatron.core.parallel_state")
    if config.tensor_model_parallel_size == 1:
        return Ranks(Group(state.get_data_parallel_group(with_context_parallel=True)))
    shards = Group(state.get_tensor_and_context_parallel_group())
    return Ranks(Group(state.get_tensor_and_data_parallel_group(with_context_parallel=True)), shards)


def tokens_of(config: Any, tokens: Tensor | None) -> Tensor | float | None:
    """What `Balancer.tap` needs for a loss that stands on every tensor-parallel rank, each with a part of its tokens.

    Megatron adds their gradients up at the router, and averages over data-parallel ranks.

    Args:
        tokens: the second of the three that a loss function returned.
    """
    shards = config.tensor_model_parallel_size
    if shards == 1:
        return tokens
    return 1 / shards if tokens is None else tokens.clamp(min=1).double() / shards  # it divides by 1 as well


def check_limits(config: Any) -> None:
    """Raises ConfigError for what was never run, or cannot work; ``config``: a ``TransformerConfig``."""
    for name, why in _refused(config):
        raise ConfigError(expected="a configuration of Megatron-core that equipoise was run with", got=name, do=why)


def _refused(config: Any) -> Iterator[tuple[str, str]]:
    sizes = {"context": "context_parallel_size", "pipeline": "pipeline_model_parallel_size"}
    for name, attribute in sizes.items():
        if (degree := getattr(config, attribute)) != 1:
            yield f"{name} parallelism of {degree}", "train with data and expert parallelism: no test has run it"
    if (degree := config.tensor_model_parallel_size) != 1 and not config.sequence_parallel:
        yield (
            f"tensor parallelism of {degree} without sequence parallelism",
            "set sequence_parallel=True: Megatron-core trains no MoE layer without it",
        )
    if config.moe_router_fusion:
        yield "moe_router_fusion=True", "set it to False: the fused router shows nobody its logits"
    if config.moe_router_force_load_balancing:
        yield "moe_router_force_load_balancing=True", "leave it out: the routers then choose nothing"
    if getattr(config, "moe_enable_routing_replay", False):
        yield "moe_enable_routing_replay=True", "leave it out: replayed choices are not balanced yet"
    if config.moe_expert_capacity_factor is not None:
        yield f"moe_expert_capacity_factor={config.moe_expert_capacity_factor:g}", "leave it out: no test has run it"
    if config.enable_cuda_graph or getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        yield "CUDA graphs", "switch them off: a graph that is replayed passes the balancer by"
    if config.fp8:
        yield f"fp8={config.fp8!r}", "train in bf16 or fp32: no test has run it"
    if config.overlap_moe_expert_parallel_comm:
        yield "overlap_moe_expert_parallel_comm=True", "leave it out: no test has run it"
