"""Fewer experts for the tokens that can spare them: which choices are dropped, and what dropping them costs.

After AdapMoE (arXiv 2408.10284). Legend: T tokens, K experts per token, J = K - 1 cuts: the 1, 2, ... J smallest
weights of a token dropped. Experts of equal weight are dropped from the last to the first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import ConfigError
from .gates import wide

__all__ = ["check_threshold", "drop_experts", "dropped_weight", "loss_per_squared_weight"]

TINY = 1e-30


def dropped_weight(weights_TK: Tensor, *, normalize: bool) -> Tensor:
    """The weight that each cut takes away, (T, J), growing along a row, in fp32 or wider.

    Args:
        normalize: of weights that a router makes sum up to a constant: their share of that sum.

    >>> dropped_weight(torch.tensor([[0.2, 1.2, 0.6]]), normalize=True)
    tensor([[0.1000, 0.4000]])
    """
    shares_TK, _ = _ascending(weights_TK, normalize)
    return shares_TK.cumsum(dim=-1)[..., :-1]


def check_threshold(threshold: float, top_k: int) -> None:
    """Raises ConfigError for a threshold of `drop_experts` below 0 or NaN, and where a token has no expert to drop.

    >>> check_threshold(0.3, top_k=2)
    """
    if not isinstance(threshold, int | float) or not threshold >= 0:
        raise ConfigError(
            expected="a threshold of 0 or more: the weight that a token may lose",
            got=f"{threshold!r}",
            do="0.3 drops the second of two normalised weights where it is below 0.3; None takes a threshold away",
        )
    if top_k < 2:
        raise ConfigError(
            expected="a router that chooses two experts a token or more, to drop some below a threshold",
            got=f"top_k={top_k}",
            do="leave it without a threshold: the largest weight of a token always stays",
        )


def drop_experts(
    weights_TK: Tensor, ids_TK: Tensor, threshold: float | Tensor, *, normalize: bool, none: int | None
) -> tuple[Tensor, Tensor]:
    """(weights, ids) with as many of a token's smallest weights dropped as together stay below ``threshold``.

    For K = 2 the second expert is dropped where w_2 < threshold. AdapMoE drops it where S w_2² < T, with a layer's
    sensitivity S (see `loss_per_squared_weight`): threshold = sqrt(T / S). For a larger K the same argument bounds the
    weight that is lost in all: S m² < T with m its sum. The largest weight always stays.

    Args:
        threshold: of `dropped_weight`; 0 drops nothing.
        normalize: the kept weights sum up to what all did, as AdapMoE's code has it for Mixtral; False leaves them as
            they are, which is right where a router's weights are scores that sum up to nothing in particular.
        none: the id of a dropped choice; None keeps the ids. Its weight is 0 either way.

    >>> weights, ids = torch.tensor([[0.9, 0.1], [0.6, 0.4]]), torch.tensor([[3, 1], [0, 2]])
    >>> drop_experts(weights, ids, 0.2, normalize=True, none=4)
    (tensor([[1.0000, 0.0000],
            [0.6000, 0.4000]]), tensor([[3, 4],
            [0, 2]]))
    """
    shares_TK, order_TK = _ascending(weights_TK, normalize)
    dropped_TK = shares_TK.cumsum(dim=-1) < threshold
    dropped_TK[..., -1] = False
    dropped_TK = torch.zeros_like(dropped_TK).scatter_(-1, order_TK, dropped_TK)
    kept_TK = weights_TK.masked_fill(dropped_TK, 0.0)
    if normalize:
        total_T1, left_T1 = (wide(x_TK).sum(dim=-1, keepdim=True) for x_TK in (weights_TK, kept_TK))
        scaled_TK = (wide(kept_TK) * (total_T1 / left_T1.clamp(min=TINY))).to(weights_TK.dtype)
        kept_TK = torch.where(dropped_TK.any(dim=-1, keepdim=True), scaled_TK, kept_TK)
    return kept_TK, ids_TK if none is None else ids_TK.masked_fill(dropped_TK, none)


def loss_per_squared_weight(weights_TK: Tensor, gradients_TK: Tensor, *, normalize: bool) -> Tensor:
    """Of each cut the expected increase of the loss over the square of the weight that it takes away, (T, J) fp64.

    A layer's output y = sum_k w_k E_k(x) changes by -m d when weights of the sum m are dropped, with d the mean of the
    dropped experts' outputs (weighted) minus that of the kept ones where the kept weights are normalised again, and the
    former alone where not. At a minimum the loss grows by half the quadratic form of its Hessian, for which AdapMoE
    takes the Fisher information E[g gᵀ], g = dL/dy (arXiv 2408.10284, section on sensitivity):

        dL = (m² / 2) dᵀ H d = (m² / 2) E[(g · d)²]

    What is returned is (g · d)² / 2; its mean over tokens and cuts is the layer's sensitivity S, so that S m² is a loss
    in nats. No expert has to be computed for itself: g · E_k(x) is the gradient of the loss at the weight w_k.

    Args:
        gradients_TK: of the loss, summed over the tokens, at these weights. With targets that the model draws itself
            their squares are an unbiased sample of the Fisher information, with those of a text of the empirical one.

    >>> loss_per_squared_weight(torch.tensor([[0.75, 0.25]]), torch.tensor([[1.0, 3.0]]), normalize=True)
    tensor([[2.]], dtype=torch.float64)
    """
    shares_TK, order_TK = _ascending(weights_TK.double(), normalize)
    shares_TK = shares_TK + TINY  # weights that have underflowed count alike
    products_TK = shares_TK * gradients_TK.double().gather(-1, order_TK)
    lost_TJ, lost_product_TJ = (x_TK.cumsum(dim=-1)[..., :-1] for x_TK in (shares_TK, products_TK))
    along_TJ = lost_product_TJ / lost_TJ
    if normalize:
        kept_TJ = shares_TK.flip(-1).cumsum(dim=-1).flip(-1)[..., 1:]
        kept_product_TJ = products_TK.flip(-1).cumsum(dim=-1).flip(-1)[..., 1:]
        along_TJ = (along_TJ - kept_product_TJ / kept_TJ) * weights_TK.double().sum(dim=-1, keepdim=True)
    return along_TJ.square() / 2


def _ascending(weights_TK: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """(weights or their shares, ascending; where each stood)."""
    wide_TK = wide(weights_TK)
    if normalize:
        wide_TK = wide_TK / wide_TK.sum(dim=-1, keepdim=True).clamp(min=TINY)
    backwards_TK, order_TK = wide_TK.flip(-1).sort(dim=-1, stable=True)  # of equal weights, the last comes first
    return backwards_TK, wide_TK.shape[-1] - 1 - order_TK
