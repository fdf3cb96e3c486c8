"""The coefficient that pushes as hard here as one did in another library."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import ConfigError, unknown_name

__all__ = ["CONVENTIONS", "convert_coef"]

# What a coefficient of 1 is there in ours, by top-k and the number of MoE layers. Ours is Megatron's: f sums to 1 over
# the experts, and every layer's loss enters whole. docs/coefficients.md has each formula, its version and its test.
CONVENTIONS: dict[str, Callable[[int, int], float]] = {
    "automodel": lambda _top_k, _layers: 1.0,
    "deepspeed": lambda _top_k, _layers: 1.0,  # its top-2 gate counts first choices only
    "lm-engine": lambda _top_k, _layers: 1.0,
    "maxtext": lambda top_k, layers: top_k / layers,  # f sums to K, mean over layers
    "megablocks": lambda _top_k, layers: 1 / layers,  # mean over layers
    "megatron": lambda _top_k, _layers: 1.0,
    "olmo-core": lambda _top_k, layers: 1 / layers,  # MoEBase, scale_loss_by_num_layers
    "olmo-core-v2": lambda _top_k, _layers: 1.0,  # nn.moe.v2 does not divide by layers
    "transformers": lambda top_k, layers: top_k / layers,  # f sums to K, counts and probabilities pooled over layers
}


def convert_coef(coef: float, source: str, *, top_k: int | None = None, num_layers: int | None = None) -> float:
    """``AuxLoss("micro_batch", coef=...)`` whose gradient is that of ``coef`` in another library.

    Args:
        source: one of ``CONVENTIONS``.
        top_k: experts per token K; needed where that library does not divide f by it.
        num_layers: MoE layers L of the model; needed where that library takes a mean over them.

    For "transformers" it is equal where all layers are loaded alike; that loss pools layers before the product of f and
    P, so that opposite imbalances cancel, which no coefficient reproduces. For "deepspeed" with K = 2 it is equal where
    first and second choices are spread alike. What a trainer multiplies on top (transformers' Trainer: accumulation
    steps times ranks) is not in it; docs/coefficients.md says what is. Raises ConfigError for an unknown library, a
    size that is needed and missing or below 1, or a coefficient below 0.

    >>> convert_coef(1e-3, "transformers", top_k=8, num_layers=48)
    0.00016666666666666666
    """
    if not 0 <= coef < math.inf:
        raise ConfigError(expected="a coefficient >= 0", got=repr(coef), do="give it as the other library has it")
    if source not in CONVENTIONS:
        raise unknown_name("source", source, CONVENTIONS)
    factor = CONVENTIONS[source]
    missing = (top_k is None and factor(2, 1) != factor(1, 1)) or (num_layers is None and factor(1, 2) != factor(1, 1))
    sizes = [1 if size is None else size for size in (top_k, num_layers)]
    if missing or min(sizes) < 1:
        raise ConfigError(
            expected=f"top_k and num_layers of at least 1{', which this source depends on' if missing else ''}",
            got=f"top_k={top_k}, num_layers={num_layers}",
            do="take both from the model's configuration",
        )
    return coef * factor(*sizes)
