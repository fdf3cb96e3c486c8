"""Which f, when the global batch comes in pieces: the choice has a name and is never hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import StateError, unknown_name
from ..functional.losses import load_fractions

__all__ = ["ESTIMATORS", "LoadHistory", "check_estimator", "shares_at"]


@dataclass
class LoadHistory:
    """What is known about the load of a router, (E,), or of several, (L, E): all that an estimator may look at.

    Counts are fp64 and summed over all ranks where a policy needs that; ``ema_E`` holds fractions.
    """

    current_E: Tensor | None = None  # this micro-step
    prefix_E: Tensor | None = None  # micro-steps 1..m of this step, this one included
    local_E: Tensor | None = None  # the same of this rank alone
    shared_E: Tensor | None = None  # the same of all ranks, up to the last micro-step at which they shared it
    counted_E: Tensor | None = None  # the whole step, from a counting pass
    previous_E: Tensor | None = None  # the step before
    ema_E: dict[float, Tensor] = field(default_factory=dict)  # decay -> average of f; its sum is that of the weights

    def add_micro_step(
        self, current_E: Tensor, local_E: Tensor | None = None, shared_E: Tensor | None = None, *, shares: bool = True
    ) -> None:
        """Adds the counts of one more micro-step: ``current_E`` over all ranks where a policy needs that, ``local_E``
        of this rank alone.

        ``shared_E``: what has come on all ranks, where they were asked at this micro-step for that and not for
        ``current_E``; ``shares``: otherwise, whether ``filled`` may know it (see `shares_at`).
        """
        self.current_E = current_E
        self.prefix_E = current_E.clone() if self.prefix_E is None else self.prefix_E + current_E
        if local_E is None or local_E is current_E:
            self.local_E = self.prefix_E
        else:
            self.local_E = local_E.clone() if self.local_E is None else self.local_E + local_E
        if shared_E is not None or shares:
            self.shared_E = self.prefix_E if shared_E is None else shared_E

    def commit(self, counts_E: Tensor, decays: set[float], keep: Tensor | None = None) -> None:
        """The step is over. One without a token leaves the history as it was, and one that ``keep`` says is bad."""
        fraction_E = load_fractions(counts_E)
        seen = counts_E.sum(dim=-1, keepdim=True) > 0
        if keep is not None:
            seen = seen & keep
            self.previous_E = torch.zeros_like(counts_E) if self.previous_E is None else self.previous_E
        self.previous_E = counts_E.clone() if self.previous_E is None else torch.where(seen, counts_E, self.previous_E)
        for decay in decays:
            old_E = self.ema_E.get(decay, torch.zeros_like(fraction_E))
            self.ema_E[decay] = torch.where(seen, decay * old_E + (1 - decay) * fraction_E, old_E)
        self.forget_step()

    def forget_step(self) -> None:
        self.current_E = self.prefix_E = self.local_E = self.shared_E = self.counted_E = None


def prefix(history: LoadHistory, _decay: float, _micro_step: int) -> Tensor | None:
    """Counts of micro-steps 1..m: the paper's buffer (arXiv 2501.11873, Alg. 1). Biased for early m."""
    assert history.prefix_E is not None
    return load_fractions(history.prefix_E)


def previous(history: LoadHistory, _decay: float, _micro_step: int) -> Tensor | None:
    """The whole global batch before. None at the first step: nothing is pushed."""
    return None if history.previous_E is None else load_fractions(history.previous_E)


def ema(history: LoadHistory, decay: float, _micro_step: int) -> Tensor | None:
    """Average over the steps before, weights decaying, summing to 1. None at the first step."""
    if decay not in history.ema_E:
        return None
    average_E = history.ema_E[decay]  # of fractions that sum to 1: what is missing are the steps before the first
    return average_E / average_E.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(average_E.dtype).tiny)


def filled(history: LoadHistory, _decay: float, _micro_step: int) -> Tensor | None:
    """What has come, and for the tokens still to come the load of the step before: ours.

    As many tokens as the step before had are assumed. On one rank what has come are micro-steps 1..m: the first is
    nearly ``previous``, the last one, where steps are equally large, ``exact``. Several ranks share it at micro-steps
    1, 2, 4, 8, ...: of M micro-steps 1 + log2(M) sum over ranks, and the only one of a step is ``exact``.
    """
    return _fill(history.shared_E, history.previous_E)


def shares_at(micro_step: int) -> bool:
    """Whether ranks share what has come in a step when this micro-step (1 = the first) is there.

    >>> [m for m in range(1, 20) if shares_at(m)]
    [1, 2, 4, 8, 16]
    """
    return micro_step & (micro_step - 1) == 0


def _fill(come_E: Tensor | None, previous_E: Tensor | None) -> Tensor:
    assert come_E is not None
    if previous_E is None:
        return load_fractions(come_E)
    total = previous_E.sum(dim=-1, keepdim=True)
    missing = (total - come_E.sum(dim=-1, keepdim=True)).clamp(min=0)
    return load_fractions(come_E + missing * (previous_E / total.clamp(min=1)))


def exact(history: LoadHistory, _decay: float, micro_step: int) -> Tensor | None:
    """The whole current global batch: from a counting pass, or this micro-step when it is the only one."""
    if history.counted_E is not None:
        return load_fractions(history.counted_E)
    if micro_step > 1:
        raise StateError(
            expected="the counts of the whole step for estimator 'exact'",
            got=f"micro-batch {micro_step} of a step without a counting pass",
            do="run its micro-batches under `with balancer.counting():` first, or use estimator='prefix'",
        )
    assert history.current_E is not None
    return load_fractions(history.current_E)


ESTIMATORS: dict[str, Callable[[LoadHistory, float, int], Tensor | None]] = {
    "prefix": prefix,
    "previous": previous,
    "ema": ema,
    "filled": filled,
    "exact": exact,
}


def check_estimator(name: str) -> str:
    """Raises ConfigError for an unknown estimator, with the nearest name.

    >>> check_estimator("ema")
    'ema'
    """
    if not isinstance(name, str) or name not in ESTIMATORS:
        raise unknown_name("estimator", name, ESTIMATORS)
    return name
