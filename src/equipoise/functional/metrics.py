"""How even a load is, and how much an expert knows about a domain: pure functions of counts, all on (..., E) tensors.

Every function returns fp64, and NaN where nothing was counted: no load is neither even nor uneven.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

__all__ = [
    "cv",
    "dead_experts",
    "efficiency",
    "gini",
    "maxvio",
    "maxvio_noise_floor",
    "min_max_ratio",
    "mutual_information",
    "normalized_entropy",
]


def maxvio(counts_E: Tensor) -> Tensor:
    """max / mean - 1, (...): 0 in balance, E - 1 when one expert gets all (arXiv 2408.15664, eq. 4).

    >>> maxvio(torch.tensor([3, 1, 0, 0]))
    tensor(2., dtype=torch.float64)
    """
    counts_E, mean = _with_mean(counts_E)
    return counts_E.amax(dim=-1) / mean - 1


def cv(counts_E: Tensor) -> Tensor:
    """Coefficient of variation, std / mean with the population std, (...): 0 in balance.

    >>> cv(torch.tensor([3, 1]))
    tensor(0.5000, dtype=torch.float64)
    """
    counts_E, mean = _with_mean(counts_E)
    spread = (counts_E - mean.unsqueeze(-1)).square().mean(dim=-1).sqrt()  # not std(): it warns where there is no layer
    return spread / mean


def normalized_entropy(counts_E: Tensor) -> Tensor:
    """- sum f ln f / ln E, (...): 1 in balance, 0 when one expert gets all. One expert alone counts as balanced.

    >>> normalized_entropy(torch.tensor([[1, 1], [5, 0]]))
    tensor([1., 0.], dtype=torch.float64)
    """
    counts_E, mean = _with_mean(counts_E)
    num_experts = counts_E.shape[-1]
    if num_experts == 1:
        return mean / mean
    fraction_E = counts_E / counts_E.sum(dim=-1, keepdim=True)
    return torch.xlogy(fraction_E, fraction_E).sum(dim=-1).abs() / math.log(num_experts)


def gini(counts_E: Tensor) -> Tensor:
    """Gini coefficient, (...): 0 in balance, (E - 1) / E when one expert gets all.

    >>> gini(torch.tensor([0, 0, 0, 8]))
    tensor(0.7500, dtype=torch.float64)
    """
    counts_E, mean = _with_mean(counts_E)
    num_experts = counts_E.shape[-1]
    rank_E = torch.arange(1, num_experts + 1, dtype=torch.float64, device=counts_E.device)
    weighted = ((2 * rank_E - num_experts - 1) * counts_E.sort(dim=-1).values).sum(dim=-1)
    return weighted / (num_experts**2 * mean)


def dead_experts(counts_E: Tensor, below: float = 0.0) -> Tensor:
    """Number of experts with no choice at all, or with at most ``below`` times the mean load, (...): fp64, for NaN.

    >>> dead_experts(torch.tensor([[4, 0, 1, 3], [0, 0, 0, 0]])), dead_experts(torch.tensor([4, 0, 1, 3]), below=0.5)
    (tensor([1., nan], dtype=torch.float64), tensor(2., dtype=torch.float64))
    """
    counts_E, mean = _with_mean(counts_E)
    return torch.where(mean > 0, (counts_E <= below * mean.unsqueeze(-1)).sum(dim=-1).double(), torch.nan)


def min_max_ratio(counts_E: Tensor) -> Tensor:
    """min / max load, (...): 1 in balance, 0 with a dead expert.

    >>> min_max_ratio(torch.tensor([2, 4]))
    tensor(0.5000, dtype=torch.float64)
    """
    counts_E = counts_E.double()
    return counts_E.amin(dim=-1) / counts_E.amax(dim=-1)


def efficiency(counts_E: Tensor) -> Tensor:
    """mean / max load, (...): the share of the time that experts work when all wait for the busiest; 1 / (1 + MaxVio).

    >>> efficiency(torch.tensor([2, 4]))
    tensor(0.7500, dtype=torch.float64)
    """
    return 1 / (1 + maxvio(counts_E))


def maxvio_noise_floor(tokens: int, top_k: float, num_experts: int) -> float:
    """MaxVio that uniformly random routing shows on average: print it beside every MaxVio.

    With the mean load mu = K T / E: m s + (m^2 - 1) (1 - 2 K / E) / (6 mu), s = sqrt((E - K) / (E - 1) / mu). m is the
    expected maximum of E standard Gaussians (Blom's approximation); s is the spread of a load whose K choices per token
    are distinct and whose sum is fixed; the second term is the binomial's skewness. K may be a mean over tokens. Within
    6 % of simulations for a mean load of 1 or more. The bound sqrt(2 ln E / mu) is 20-100 % too high: a router could
    look better than chance.

    >>> round(maxvio_noise_floor(2048 * 64 // 8, 8, 64), 3)
    0.049
    """
    if tokens <= 0 or not 0 < top_k < num_experts:
        return 0.0
    share = top_k / num_experts
    load = tokens * share
    largest = NormalDist().inv_cdf((num_experts - 0.375) / (num_experts + 0.25))
    spread = math.sqrt((num_experts - top_k) / (num_experts - 1) / load)
    skew = (largest**2 - 1) * (1 - 2 * share) / (6 * load)
    return min(max(largest * spread + skew, 0.0), 1 / share - 1)  # one token shows E / K - 1, the largest there is


def mutual_information(counts_DE: Tensor, *, equal_domains: bool = True) -> Tensor:
    """I(expert; domain) in nats from counts (..., D, E): 0 when every domain uses the experts alike, at most ln D.

    A domain without choices is left out, and where there is none with choices it is NaN.
    ``equal_domains`` gives each domain the same weight, whatever text there was of it. A small sample is biased upwards
    by about (E - 1)(D - 1) / (2 N): compare with shuffled domain labels.

    >>> mutual_information(torch.tensor([[5, 0], [0, 7]]))
    tensor(0.6931, dtype=torch.float64)
    """
    counts_DE = counts_DE.double()
    given_DE = counts_DE / counts_DE.sum(dim=-1, keepdim=True).clamp(min=1e-30)
    weight_D = counts_DE.sum(dim=-1)
    if equal_domains:
        weight_D = (weight_D > 0).double()
    weight_D = weight_D / weight_D.sum(dim=-1, keepdim=True)
    overall_E = (weight_D.unsqueeze(-1) * given_DE).sum(dim=-2)
    within = -(weight_D * torch.xlogy(given_DE, given_DE).sum(dim=-1)).sum(dim=-1)
    return (-torch.xlogy(overall_E, overall_E).sum(dim=-1) - within).clamp(min=0.0)


def _with_mean(counts_E: Tensor) -> tuple[Tensor, Tensor]:
    counts_E = counts_E.double()
    return counts_E, counts_E.mean(dim=-1)
