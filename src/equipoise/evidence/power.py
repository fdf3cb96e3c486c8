"""How large a difference so many paired runs can see, and how many runs a difference needs."""

from __future__ import annotations

import math

from scipy import optimize, stats

__all__ = ["PAIRS", "detectable", "pairs_needed", "power"]

PAIRS = (3, 5, 8)  # how many are told what they see


def power(effect: float, sd: float, pairs: int, *, level: float = 0.05) -> float:
    """Chance that a paired two-sided t-test at ``level`` tells a mean difference ``effect`` from zero.

    Args:
        sd: standard deviation of the paired differences.

    >>> round(power(0.011, 0.0058, 8), 3)
    0.995
    """
    if pairs < 2:
        return 0.0
    critical, shift = stats.t.ppf(1 - level / 2, pairs - 1), effect / sd * math.sqrt(pairs)
    wrong_side = float(stats.nct.cdf(-critical, pairs - 1, shift))  # NaN where it is too small for scipy
    return float(stats.nct.sf(critical, pairs - 1, shift)) + (0.0 if math.isnan(wrong_side) else wrong_side)


def detectable(sd: float, pairs: int, *, chance: float = 0.8, level: float = 0.05) -> float:
    """The smallest mean difference that is told from zero with probability ``chance``, in the unit of ``sd``.

    >>> [round(detectable(0.0058, pairs), 4) for pairs in (3, 5, 8)]
    [0.0189, 0.0098, 0.0067]
    """
    high = sd
    while power(high, sd, pairs, level=level) < chance:
        high *= 2
    found = optimize.root_scalar(lambda effect: power(effect, sd, pairs, level=level) - chance, bracket=(0.0, high))
    return float(found.root)


def pairs_needed(effect: float, sd: float, *, chance: float = 0.8, level: float = 0.05, most: int = 1000) -> int:
    """The fewest pairs that see ``effect`` with probability ``chance``; ``most`` where more would be needed.

    >>> pairs_needed(0.011, 0.0058)
    5
    """
    return next((pairs for pairs in range(2, most) if power(effect, sd, pairs, level=level) >= chance), most)
