"""Several forwards before one tap: what only those counted stays in the step that the tapped loss is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from ..autograd.router_state import ForwardStats, take_pending
from ..torch_internals import forward_position
from .layer_group import LayerGroup

__all__ = ["ForwardPasses"]

MOST = 64  # passes that are held apart before a tap; of more, the oldest become one


@dataclass
class _Pass:
    """A forward with gradient: autograd numbers its nodes as they are made, so those of a forward are a range."""

    begin: int
    end: int | None = None  # it runs, or stopped on an error
    taken: list[ForwardStats] | None = None  # of each group; None: still in what is pending


class ForwardPasses:
    """The forwards of one part of a model since the last tap.

    A pair of them (chosen and rejected answers) is one micro-batch. One whose output the loss does not use pushes
    nothing, and what it counted would dilute the others: found by walking the loss's graph, a few nodes where there was
    one forward, and no further back than the first of them where there were several.
    """

    def __init__(self, groups: Sequence[LayerGroup]) -> None:
        self._groups = groups
        self._passes: list[_Pass] = []

    def begins(self) -> None:
        self.hold()
        if self._passes and self._passes[-1].end is None:
            self._passes[-1].end = self._passes[-1].begin
        if len(self._passes) >= MOST:
            first, second = self._passes[:2]
            taken = _added([one.taken for one in (first, second) if one.taken is not None])
            for one in taken:
                for placed in one.placed:
                    del placed[:-MOST]
            self._passes[:2] = [_Pass(first.begin, second.end, taken)]
        self._passes.append(_Pass(forward_position()))

    def ends(self) -> None:
        if self._passes:
            self._passes[-1].end = forward_position()

    def hold(self) -> None:
        """Takes the last pass: another begins, or a backward whose recompute would mix with what is pending."""
        if self._passes and self._passes[-1].taken is None:
            self._passes[-1].taken = self._take()

    def take(self, loss: Tensor) -> list[ForwardStats]:
        """What the forwards measured that ``loss`` is made of, for each group; nothing where it is made of none.

        The others wait for a tap of their own, until the step is over.
        """
        passes, self._passes = self._passes, []
        if not passes:  # in a compiled graph
            return self._take()
        if passes[-1].taken is None:
            passes[-1].taken = self._take()
        was = _reached(loss, passes)
        self._passes = [one for one, used in zip(passes, was, strict=True) if not used]
        used = [one.taken for one, used in zip(passes, was, strict=True) if used and one.taken is not None]
        return _added(used) if used else self._take()  # what is pending are empty

    def forget(self) -> None:
        self._passes = []

    def _take(self) -> list[ForwardStats]:
        return [take_pending(group.states) for group in self._groups]


def _reached(loss: Tensor, passes: Sequence[_Pass]) -> list[bool]:
    """Whether a node of each pass is in the graph of ``loss``; nodes lead to older ones only."""
    found, oldest = [False] * len(passes), min(one.begin for one in passes)
    todo = [loss.grad_fn] if loss.grad_fn is not None else []
    seen = set(todo)
    while todo and not all(found):
        node = todo.pop()
        number = node._sequence_nr()
        for i, one in enumerate(passes):
            found[i] = found[i] or (one.begin <= number and (one.end is None or number < one.end))
        older = {after for after, _ in node.next_functions if after is not None} - seen
        older = {after for after in older if oldest <= after._sequence_nr() < 2**63}  # leaves have the largest number
        seen |= older
        todo += older
    return found


def _added(of_passes: Sequence[list[ForwardStats]]) -> list[ForwardStats]:
    """The same of several passes as of one."""
    if len(of_passes) == 1:
        return of_passes[0]
    return [
        ForwardStats(
            torch.stack([one.statistics_LS for one in of_group]).sum(dim=0),
            None if of_group[0].gram_LEE is None else torch.stack([one.gram_LEE for one in of_group]).sum(dim=0),
            [list(chain(*calls)) for calls in zip(*(one.shard_counts for one in of_group), strict=True)],
            [list(chain(*calls)) for calls in zip(*(one.placed for one in of_group), strict=True)],
            sum(one.passes for one in of_group),
            all(one.eager for one in of_group),
        )
        for of_group in zip(*of_passes, strict=True)
    ]
