"""Expected maxima in plain floats: the noise floor of MaxVio, and of a load over many ranks."""

from __future__ import annotations

import math
from statistics import NormalDist

__all__ = ["expected_max", "random_maxvio"]


def expected_max(n: int) -> float:
    """Mean of the largest of ``n`` independent standard normal numbers (Blom's approximation, 0 for n = 1).

    >>> expected_max(1), round(expected_max(2), 2), round(expected_max(1000), 2)
    (0.0, 0.59, 3.23)
    """
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def random_maxvio(tokens: float, top_k: float, num_experts: int) -> float:
    """Mean MaxVio of uniformly random routing: ``functional.metrics.maxvio_noise_floor`` without torch.

    >>> round(random_maxvio(2048 * 64 // 8, 8, 64), 3)
    0.049
    """
    if not 0 < top_k < num_experts or tokens <= 0:
        return 0.0
    share = top_k / num_experts
    load = tokens * share
    largest = expected_max(num_experts)
    spread = math.sqrt((num_experts - top_k) / (num_experts - 1) / load)
    skew = (largest**2 - 1) * (1 - 2 * share) / (6 * load)
    return min(max(largest * spread + skew, 0.0), 1 / share - 1)
