"""Expert choice: each expert takes the tokens of a pool that it scores highest, so that all experts take equally many.

Shapes: T tokens of one pool, E experts, P (token, expert) pairs. Leading dimensions are pools of their own.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigError, InputError

__all__ = [
    "capacity_loss",
    "check_capacity",
    "choose_tokens",
    "kth_largest",
    "prediction_counts",
    "prediction_quality",
    "taken_pairs",
    "tokens_per_expert",
]

ROUNDING = 1e-9  # 0.7 * 10 is a little more than 7 in floating point, and other products a little less


def check_capacity(num_experts: int, capacity: float) -> None:
    """Raises ConfigError for experts that could not take so many tokens of any pool.

    >>> check_capacity(4, 5.0)
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected 0 < capacity <= num_experts
      got: capacity=5.0, num_experts=4
      do:  1 lets a token use one expert on average, num_experts all of them
    """
    if not isinstance(capacity, int | float) or num_experts < 1 or not 0 < capacity <= num_experts:
        raise ConfigError(
            expected="0 < capacity <= num_experts",
            got=f"capacity={capacity!r}, num_experts={num_experts}",
            do="1 lets a token use one expert on average, num_experts all of them",
        )


def tokens_per_expert(tokens: int, num_experts: int, capacity: float) -> int:
    """floor(T · C / E): how many tokens of a pool of T each expert takes, at a capacity of C experts a token.

    Raises ConfigError for a capacity that no pool could have, InputError for a pool of which an expert gets no token.

    >>> tokens_per_expert(64, 8, 1.0), tokens_per_expert(30, 8, 1.5)
    (8, 5)
    """
    check_capacity(num_experts, capacity)
    count = math.floor(tokens * capacity / num_experts + ROUNDING)
    if count < 1:
        raise InputError(
            expected=f"a pool of {math.ceil(num_experts / capacity - ROUNDING)} tokens or more, one for each expert",
            got=f"{tokens} tokens for {num_experts} experts at capacity {capacity}",
            do="take a wider scope for the pool, fewer experts, or a higher capacity",
        )
    return count


def choose_tokens(scores_TE: Tensor, capacity: float) -> Tensor:
    """Which token each expert takes, (..., T, E) bool: True for its ``tokens_per_expert`` highest scores in the pool.

    Expert choice (arXiv 2202.09368), in a pool that may be one sample (EC-DiT, arXiv 2410.02098) or a whole
    batch (DiffMoE, arXiv 2503.14487). A token may be taken by several experts, or by none. Of equal
    scores the earlier token is taken, so that an expert never takes more than the others. Of no
    tokens nobody takes one.

    Raises what ``tokens_per_expert`` raises.

    >>> choose_tokens(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.2, 0.8]]), capacity=1.0).int()
    tensor([[1, 0],
            [1, 0],
            [0, 1],
            [0, 1]], dtype=torch.int32)
    """
    if not scores_TE.shape[-2]:
        return torch.zeros_like(scores_TE, dtype=torch.bool)
    count = tokens_per_expert(scores_TE.shape[-2], scores_TE.shape[-1], capacity)
    best_CE = scores_TE.detach().sort(dim=-2, descending=True, stable=True).indices[..., :count, :]
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(-2, best_CE, True)


def taken_pairs(taken_TE: Tensor) -> tuple[Tensor, Tensor]:
    """(token_ids_P, expert_ids_P), int64, of the True entries: expert after expert, tokens in their order.

    >>> taken_pairs(torch.tensor([[True, True], [False, True]]))
    (tensor([0, 0, 1]), tensor([0, 1, 1]))
    """
    expert_ids_P, token_ids_P = taken_TE.t().nonzero(as_tuple=True)
    return token_ids_P, expert_ids_P


def capacity_loss(logits_TE: Tensor, taken_TE: Tensor) -> Tensor:
    """Mean binary cross-entropy (nats) between what the capacity predictor says and which tokens experts took.

    The capacity predictor of DiffMoE, arXiv 2503.14487; the auxiliary router of MoMa, arXiv 2407.21770. ``logits_TE``
    are of inputs without gradient. Of no tokens it is 0.

    >>> capacity_loss(torch.zeros(2, 2), torch.tensor([[True, False], [False, True]]))
    tensor(0.6931)
    """
    if not logits_TE.numel():
        return logits_TE.sum()
    return F.binary_cross_entropy_with_logits(logits_TE, taken_TE.to(logits_TE.dtype))


def prediction_counts(predicted_TE: Tensor, taken_TE: Tensor) -> Tensor:
    """(2, 2) int64, additive over tokens: rows are not taken and taken, columns not predicted and predicted.

    ``predicted_TE`` is what an auxiliary router lets experts compute at inference (MoMa, arXiv 2407.21770),
    ``taken_TE`` what the experts would have chosen from the whole pool.

    >>> prediction_counts(torch.tensor([[True, False], [True, True]]), torch.tensor([[True, True], [False, True]]))
    tensor([[0, 1],
            [1, 2]])
    """
    return torch.bincount((2 * taken_TE.long() + predicted_TE.long()).flatten(), minlength=4).view(2, 2)


def prediction_quality(counts_22: Tensor) -> tuple[float, float, float]:
    """(accuracy, precision, recall) of `prediction_counts`; NaN where nothing was there to be right about.

    Accuracy alone says little: of 4 experts at capacity 1, "nobody takes it" is right 3 times in 4.

    >>> prediction_quality(torch.tensor([[6, 0], [1, 1]]))
    (0.875, 1.0, 0.5)
    """
    (absent, wrong), (missed, right) = counts_22.tolist()

    def share(part: int, whole: int) -> float:
        return part / whole if whole else math.nan

    return (
        share(absent + right, absent + wrong + missed + right),
        share(right, right + wrong),
        share(right, right + missed),
    )


def kth_largest(scores_TE: Tensor, k: int) -> Tensor:
    """The k-th largest score of each expert, (E,): the predictor's score that its last token would have.

    >>> kth_largest(torch.tensor([[0.1, 0.5], [0.9, 0.4], [0.3, 0.6]]), 2)
    tensor([0.3000, 0.5000])
    """
    return scores_TE.topk(k, dim=0).values[-1]
