"""The counting pass: what the whole step holds, before its first backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..autograd.router_state import take_pending
from ..distributed import Group
from .layer_group import LayerGroup
from .reduction import StepReduction

__all__ = ["counting_pass", "keep_counted", "take_counted"]


@contextmanager
def counting_pass(groups: Sequence[LayerGroup], *, pools: bool) -> Iterator[None]:
    """Around one forward of every micro-batch. ``pools``: keep every token's experts, for scope "shuffle"."""
    for group in groups:
        group.forget_step()
        for state in group.states:
            state.pooled_ids = [] if pools else None
    # collecting every token's experts is a side effect that no compiler takes under a checkpoint
    stance = torch.compiler.set_stance("force_eager") if pools else nullcontext()
    with stance, torch.random.fork_rng(), torch.no_grad():
        yield


def take_counted(groups: Sequence[LayerGroup]) -> list[Tensor]:
    """What this rank counted, (L, S) for each group."""
    return [take_pending(group.states).statistics_LS for group in groups]


def keep_counted(groups: Sequence[LayerGroup], taken: Sequence[Tensor], sums: StepReduction, tokens: Group) -> None:
    """Gives each group the counts of all ranks, and its pools."""
    for group, counted_LS in zip(groups, sums.start_counts(taken)(), strict=True):
        group.counted = counted_LS
        group.histories.keep_counted(counted_LS)
        pools = [state.pooled_ids for state in group.states]
        none = [torch.zeros(0, group.spec.top_k, dtype=torch.long, device=group.device)]  # of a layer that did not run
        group.pools = [tokens.gather_rows(torch.cat(pool or none)) for pool in pools if pool is not None]
        for state in group.states:
            state.pooled_ids = None
