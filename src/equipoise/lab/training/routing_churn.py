"""How many choices of the same held-out tokens changed from one evaluation to the next.

Legend: N sequences of S tokens that are looked at, L layers, K experts per token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...functional.specialization import churn

__all__ = ["LastRouting", "every_token", "ids_dtype"]

TOKENS = (
    2**17
)  # that are remembered, and lie in each checkpoint: 50 MB at 48 layers and top-8, however long the text is


class LastRouting:
    """What the evaluation before chose; a checkpoint keeps ``ids_NLSK``.

    >>> last = LastRouting()
    >>> last.churn(torch.tensor([[[[0, 1]]]]), num_experts=4)
    []
    >>> last.churn(torch.tensor([[[[1, 2]]]]), num_experts=4)
    [0.5]
    """

    def __init__(self) -> None:
        self.ids_NLSK: Tensor | None = None  # None: there was none

    def churn(self, ids_NLSK: Tensor, num_experts: int) -> list[float]:
        """Of each layer the share of choices that are new, and these are remembered; empty without any before. An id of
        ``num_experts`` is none."""
        before_NLSK, self.ids_NLSK = self.ids_NLSK, ids_NLSK
        if before_NLSK is None:
            return []
        of_layers = zip(ids_NLSK.unbind(1), before_NLSK.unbind(1), strict=True)  # K x K a token is much for all at once
        return [churn(*pair, num_experts).nanmean().item() for pair in of_layers]


def every_token(tokens: int) -> int:
    """Each so many-th token of a sequence is looked at, where ``tokens`` in all are evaluated.

    >>> every_token(6 * 64 * 256), every_token(6 * 64 * 4096)
    (1, 12)
    """
    return -(-tokens // TOKENS)


def ids_dtype(choices: int) -> torch.dtype:
    """The smallest that holds so many ids and that every backend sums and sends: none has two bytes.

    >>> ids_dtype(8), ids_dtype(512)
    (torch.uint8, torch.int32)
    """
    return torch.uint8 if choices <= 256 else torch.int32
