"""How many of its K experts a layer needs: the share of router weight that the largest of a token's weights hold.

LaDiMo (arXiv 2408.04278) profiles the distribution of router weights and picks a routing policy for each layer by it.
Its rule is not public in detail; this one is ours: the smallest number of experts that keeps a given share.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...errors import ConfigError

__all__ = ["kept_shares", "smallest_top_k"]


def kept_shares(weights_TK: Tensor) -> list[float]:
    """Of K weights a token, the mean over tokens of the share that the 1, 2 ... K largest hold.

    >>> import torch
    >>> [round(share, 2) for share in kept_shares(torch.tensor([[0.2, 0.8], [0.5, 0.5]]))]
    [0.65, 1.0]
    """
    sorted_TK = weights_TK.double().sort(dim=-1, descending=True).values
    shares_TK = sorted_TK.cumsum(dim=-1) / sorted_TK.sum(dim=-1, keepdim=True)
    return shares_TK.mean(dim=0).tolist()


def smallest_top_k(shares: Sequence[float], least: float) -> int:
    """The smallest number of experts that keeps at least a share ``least`` of the router's weight, in (0, 1].

    >>> smallest_top_k([0.55, 0.8, 0.95, 1.0], 0.9)
    3
    """
    if not 0 < least <= 1:
        raise ConfigError(expected="a share above 0 and at most 1", got=str(least), do="1 keeps all K experts")
    return next((k for k, share in enumerate(shares, start=1) if share >= least), len(shares))
