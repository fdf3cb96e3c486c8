"""How many layers of a model have experts, from the names that configurations use for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

__all__ = ["moe_layers"]

ROUTED = ("moe", "sparse")  # not "dense", and not "hash_moe", whose experts follow token ids
TWO_STACKS = ("encoder_sparse_step", "num_sparse_encoder_layers")


def moe_layers(config: Mapping[str, Any]) -> int | None:
    """The number of layers with a router; None where the configuration does not say.

    >>> moe_layers({"num_hidden_layers": 61, "first_k_dense_replace": 3})
    58
    >>> moe_layers({"num_hidden_layers": 8, "decoder_sparse_step": 2, "mlp_only_layers": [1]})
    3
    """
    for name in ("mlp_layer_types", "layers_block_type"):
        kinds = config.get(name)
        if isinstance(kinds, list | tuple) and kinds:
            return sum(kind in ROUTED for kind in kinds)
    pattern = config.get("hybrid_override_pattern")
    if isinstance(pattern, str):
        return pattern.count("E")
    if isinstance(listed := config.get("moe_layers"), list | tuple):
        return len(listed)
    if any(name in config for name in TWO_STACKS):
        return None
    named = (config.get(name) for name in ("num_hidden_layers", "num_layers", "n_layers"))
    depths = [value for value in named if _whole(value)]
    depth = min(depths, default=0)  # LongCat-Flash counts two attentions a layer in one of them
    return sum(_has_experts(config, i, depth) for i in range(depth)) if depths else None


def _has_experts(config: Mapping[str, Any], i: int, depth: int) -> bool:
    def number(name: str, default: int) -> int:
        value = config.get(name)
        return value if _whole(value) else default

    dense = max(number("first_k_dense_replace", 0), number("num_dense_layers", 0))
    frequency = config.get("moe_layer_freq")
    if isinstance(frequency, list | tuple):
        return i < len(frequency) and bool(frequency[i])
    end = number("moe_layer_end_index", depth)
    return (
        max(dense, number("moe_layer_start_index", 0)) <= i <= (end if end >= 0 else depth)
        and i % max(number("moe_layer_freq", 1), 1) == 0
        and i not in (config.get("mlp_only_layers") or ())
        and i % max(number("expert_layer_period", 1), 1) == number("expert_layer_offset", 0)
        and all((i + 1) % max(number(name, 1), 1) == 0
                for name in ("decoder_sparse_step", "moe_layer_interval", "interleave_moe_layer_step"))
    )  # fmt: skip


def _whole(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
