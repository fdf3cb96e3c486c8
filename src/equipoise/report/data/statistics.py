"""Means and paired differences over seeds, with t-intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["Difference", "Estimate", "estimate", "paired_difference", "t_quantile"]

# Student's t, two-sided 95 %, for 1 to 30 degrees of freedom (a standard table)
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
         2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
         2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423)  # fmt: skip


@dataclass(frozen=True)
class Estimate:
    """Mean over the seeds of one strategy. ``low`` and ``high`` are the smallest and the largest value."""

    mean: float
    low: float
    high: float
    n: int
    by_seed: dict[int, float]


@dataclass(frozen=True)
class Difference:
    """Strategy minus baseline, paired by seed. ``low`` and ``high`` bound the 95 % t-interval, None for one pair.

    For ratios (perplexity, seconds) the numbers are relative: -0.08 is 8 % less than the baseline.
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    by_seed: dict[int, float]

    @property
    def is_clear(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def t_quantile(degrees: int) -> float:
    """97.5 % quantile of Student's t distribution: half the width of a 95 % interval in standard errors.

    >>> t_quantile(1), t_quantile(4)
    (12.7062, 2.7764)
    >>> round(t_quantile(60), 3)
    2.0
    """
    if degrees < 1:
        raise ValueError("an interval needs two values")
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = NormalDist().inv_cdf(0.975)  # and the first terms of its expansion in 1 / degrees
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def estimate(by_seed: Mapping[int, float], *, ratio: bool = False) -> Estimate | None:
    """Mean over the seeds with a finite value, geometric if ``ratio``; None if there is none.

    >>> estimate({0: 1.0, 1: 3.0, 2: float("nan")})
    Estimate(mean=2.0, low=1.0, high=3.0, n=2, by_seed={0: 1.0, 1: 3.0})
    >>> estimate({0: 1.0, 1: 4.0}, ratio=True).mean
    2.0
    """
    values = {seed: value for seed, value in by_seed.items() if math.isfinite(value)}
    if not values:
        return None
    data = list(values.values())
    if ratio and min(data) > 0:
        mean = math.exp(math.fsum(map(math.log, data)) / len(data))
    else:
        mean = math.fsum(data) / len(data)
    return Estimate(mean, min(data), max(data), len(data), values)


def paired_difference(
    treated: Mapping[int, float], baseline: Mapping[int, float], *, ratio: bool = False
) -> Difference | None:
    """Differences by seed, their mean and 95 % t-interval; None if no seed is finite in both.

    Pairing removes the variation that both runs share (initial weights, data order).

    >>> difference = paired_difference({0: 35.0, 1: 36.0, 2: 35.5}, {0: 38.0, 1: 39.1, 2: 38.6})
    >>> round(difference.mean, 3), round(difference.low, 3), round(difference.high, 3), difference.n
    (-3.067, -3.21, -2.923, 3)
    >>> round(paired_difference({0: 35.1}, {0: 38.3}, ratio=True).mean, 4)
    -0.0836
    """
    by_seed = {}
    for seed in sorted(treated.keys() & baseline.keys()):
        a, b = treated[seed], baseline[seed]
        if math.isfinite(a) and math.isfinite(b) and (not ratio or (a > 0 and b > 0)):
            by_seed[seed] = math.log(a / b) if ratio else a - b
    if not by_seed:
        return None
    back = math.expm1 if ratio else float  # the interval is symmetric in the logarithm
    mean, half = _mean_and_half_width(list(by_seed.values()))
    low, high = (None, None) if half is None else (back(mean - half), back(mean + half))
    return Difference(back(mean), low, high, len(by_seed), {seed: back(value) for seed, value in by_seed.items()})


def _mean_and_half_width(data: Sequence[float]) -> tuple[float, float | None]:
    n = len(data)
    mean = math.fsum(data) / n
    if n < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in data) / (n - 1)
    return mean, t_quantile(n - 1) * math.sqrt(variance / n)
