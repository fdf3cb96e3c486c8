"""What is known of the loads of a group of layers: of all tokens, and of each class of tokens that a loss is of.

One tensor of loads travels between ranks, (L, X): the counts of all tokens, and behind them `class_load` of each class.
Without classes it is the counts alone, untouched.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..autograd.spec import StatsSpec
from ..policies.estimators import LoadHistory
from ..policies.token_classes import class_load

__all__ = ["LoadHistories"]


class LoadHistories:
    """A `LoadHistory` of all tokens and one of each class.

    >>> LoadHistories(StatsSpec(4, 2, "softmax")).of_class
    {}
    """

    def __init__(self, spec: StatsSpec) -> None:
        self._spec = spec
        self.whole = LoadHistory()
        self.of_class = {name: LoadHistory() for name in spec.term_classes}
        self._all = [self.whole, *self.of_class.values()]

    def loads(self, statistics_LS: Tensor) -> Tensor:
        """(L, X) of what routers measured."""
        parts = self._parts(statistics_LS)
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    @property
    def local(self) -> Tensor | None:
        """(L, X) of the step so far, on this rank; None before its first micro-batch."""
        parts = [one.local_E for one in self._all if one.local_E is not None]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] if parts else None

    def add_micro_step(self, current: Tensor, local: Tensor, shared: Tensor | None = None, *, shares: bool) -> None:
        """As `LoadHistory.add_micro_step`, of (L, X)."""
        currents = self._split(current)
        locals_ = currents if local is current else self._split(local)
        shareds = [None] * len(self._all) if shared is None else self._split(shared)
        for history, now, own, of_all in zip(self._all, currents, locals_, shareds, strict=True):
            history.add_micro_step(now, own, of_all, shares=shares)

    def commit(self, summed_LS: Tensor, decays: set[float], keep: Tensor | None = None) -> None:
        """The step is over; one without a token of a class leaves what is remembered of that class as it was."""
        counts_LE, *of_classes = self._parts(summed_LS)
        self.whole.commit(counts_LE, decays, keep)
        for history, load_LX in zip(self.of_class.values(), of_classes, strict=True):
            seen_L1 = load_LX[:, -2:-1] > 0
            history.commit(load_LX, decays, seen_L1 if keep is None else seen_L1 & keep)

    def keep_counted(self, counted_LS: Tensor) -> None:
        """What a counting pass saw, on all ranks."""
        for history, load in zip(self._all, self._parts(counted_LS), strict=True):
            history.counted_E = load

    def forget_step(self) -> None:
        for history in self._all:
            history.forget_step()

    def _parts(self, statistics_LS: Tensor) -> list[Tensor]:
        """What each history is told of them."""
        spec, counts_LE = self._spec, self._spec.counts(statistics_LS)
        found = [counts_LE]
        for name in self.of_class:
            own_LE, _, own_L = spec.of_class(statistics_LS, name)
            found.append(class_load(counts_LE, own_LE, spec.scalar(statistics_LS, "tokens"), own_L))
        return found

    def _split(self, loads_LX: Tensor) -> Sequence[Tensor]:
        experts = self._spec.num_experts
        sizes = [experts] + [experts + 3] * len(self.of_class)
        return loads_LX.split(sizes, dim=1) if self.of_class else [loads_LX]
