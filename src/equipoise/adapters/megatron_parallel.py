"""Megatron-core: which ranks route which tokens, what its schedule divides a loss by, and what is refused by name."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ..distributed import Group, Ranks
from ..errors import ConfigError
from ..storage.balancer_file import FILE

__all__ = [
    "check_limits",
    "data_ranks",
    "is_a_stage",
    "is_last_stage",
    "ranks_of",
    "scale_of",
    "stage_file",
    "tokens_of",
]


def ranks_of(config: Any) -> Ranks:
    """Tensor- and context-parallel ranks route other parts of the same sequences, pipeline stages hold other layers.

    Of tensor-parallel ranks that holds because every MoE layer of Megatron's trains with sequence parallelism.
    """
    state = importlib.import_module("megatron.core.parallel_state")
    data = Group(state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    shards = Group(state.get_tensor_and_context_parallel_group())
    return Ranks(data, shards, Group.world() if config.pipeline_model_parallel_size > 1 else data)


def tokens_of(config: Any, tokens: Tensor | None) -> Tensor | float | None:
    """What `Balancer.tap` has to know of a loss function's loss where sequences are cut over ranks.

    A loss stands on every tensor-parallel rank, each of which routes a part of its tokens, and Megatron adds their
    gradients up. A mean is one over all context-parallel ranks, and Megatron multiplies it by their number.

    Args:
        tokens: the second of the three that a loss function returned; None where it returned two.
    """
    tensor, context = config.tensor_model_parallel_size, config.context_parallel_size
    if tokens is None:
        return None if tensor * context == 1 else 1 / (tensor * context)
    return tokens if tensor == 1 else tokens.clamp(min=1).double() / tensor  # Megatron divides by 1 as well


def scale_of(config: Any) -> Tensor:
    """What the loss of the last stage is multiplied by, for one without it: read when a backward begins.

    Megatron sets it for its own losses after every forward: the loss scale, divided by the number of micro-batches.
    """
    own = importlib.import_module("megatron.core.transformer.moe.moe_utils").MoEAuxLossAutoScaler
    return own.main_loss_backward_scale.double() / (config.tensor_model_parallel_size * config.context_parallel_size)


def data_ranks() -> int:
    """Ranks, or groups of ranks, that see other sequences."""
    return importlib.import_module("megatron.core.parallel_state").get_data_parallel_world_size()


def is_a_stage() -> bool:
    """Whether this rank holds only some of the model's layers."""
    state = importlib.import_module("megatron.core.parallel_state")
    return state.model_parallel_is_initialized() and state.get_pipeline_model_parallel_world_size() > 1


def is_last_stage() -> bool:
    return importlib.import_module("megatron.core.parallel_state").is_pipeline_last_stage()


def stage_file(config: Any) -> str:
    """Where a stage's state lies beside a checkpoint: each has other layers."""
    state = importlib.import_module("megatron.core.parallel_state")
    stage = state.get_pipeline_model_parallel_rank() if config.pipeline_model_parallel_size > 1 else 0
    return FILE if stage == 0 else f"stage{stage}.{FILE}"


def check_limits(config: Any) -> None:
    """Raises ConfigError for what was never run, or cannot work; ``config``: a ``TransformerConfig``."""
    for name, why in _refused(config):
        raise ConfigError(expected="a configuration of Megatron-core that equipoise was run with", got=name, do=why)


def _refused(config: Any) -> Iterator[tuple[str, str]]:
    if config.virtual_pipeline_model_parallel_size is not None:
        yield "virtual_pipeline_model_parallel_size, an interleaved pipeline", "leave it out: no test has run it"
    if getattr(config, "hybrid_context_parallel", False):
        yield "hybrid_context_parallel=True", "leave it out: its groups of ranks change from batch to batch"
    if config.pipeline_model_parallel_size > 1 and config.calculate_per_token_loss:
        yield (
            "calculate_per_token_loss=True with pipeline parallelism",
            "set it to False: a stage without the loss does not know how many tokens that is a sum over",
        )
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
