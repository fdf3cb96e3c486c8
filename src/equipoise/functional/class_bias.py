"""The selection bias of each token, where classes of tokens have biases of their own. Legend: T tokens, E experts."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["token_biases"]


def token_biases(bias_E: Tensor | None, of_classes: Sequence[tuple[Tensor, Tensor]], place: str = "scores") -> Tensor:
    """(T, E): the bias of all tokens and those of the classes that a token is of, together.

    They add up. For place "multiply" the factors 1 + bias multiply: so a constant factor in one of them changes no
    choice, as a constant summand changes none elsewhere, and each may be centred for itself.

    Args:
        bias_E: of all tokens; None: there is none.
        of_classes: for each class, one at least, a mask (T,), True for its tokens, and their bias (E,).

    >>> image = torch.tensor([True, False]), torch.tensor([0.5, -0.5])
    >>> token_biases(torch.tensor([1.0, 0.0]), [image])
    tensor([[ 1.5000, -0.5000],
            [ 1.0000,  0.0000]])
    >>> token_biases(torch.tensor([1.0, 0.0]), [image], "multiply")
    tensor([[ 2.0000, -0.5000],
            [ 1.0000,  0.0000]])
    """
    parts = [] if bias_E is None else [bias_E]
    parts += [torch.where(mask_T.unsqueeze(-1), own_E, 0.0) for mask_T, own_E in of_classes]
    if place == "multiply":
        return functools.reduce(torch.mul, [1 + part for part in parts]) - 1
    return functools.reduce(torch.add, parts)
