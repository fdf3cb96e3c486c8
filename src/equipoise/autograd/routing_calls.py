"""The calls of a router whose choices are recorded, or replayed: what it dispatches in place of what it would choose.

A router hands its choice to ``dispatch`` and weighs what comes back by its live scores; nothing else of it changes.
``dispatch`` is in no compiled graph; it is made with its object, so that who imports this loads no compiler.
Legend: T tokens, E experts, K experts per token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InputError, StateError
from .router_state import recomputes

__all__ = ["Dispatch", "RecordedCalls", "ReplayedCalls"]


class Dispatch(NamedTuple):
    """What a router sends its tokens to."""

    ids_TK: Tensor
    # (T, 2) fp64: choices that were replayed, and those of them that the router would not have made; None: its own
    replayed_T2: Tensor | None = None


MOST = 64  # forwards of contexts that are over which are remembered
NEAR = 2.0**-6  # of the spread of a sum: rounding of a recompute in bf16 is below, another batch far above
Choose = Callable[[Tensor, Tensor], Dispatch]  # (choice (T, K), logits (T, E)) -> what is dispatched


class RecordedCalls:
    """Keeps what a router chooses, a tensor (T, K) a call, in the fewest bytes that hold E.

    >>> calls = RecordedCalls(num_experts=8)
    >>> calls.dispatch(torch.tensor([[0, 3]]), torch.zeros(1, 8)).replayed_T2 is None
    True
    >>> calls.ids
    [tensor([[0, 3]], dtype=torch.int16)]
    """

    ended = False

    def __init__(self, num_experts: int) -> None:
        self.ids: list[Tensor] = []
        self.before: list[_Given] = []  # of replays that are over: their recompute may still come
        self._dtype = torch.int16 if num_experts <= torch.iinfo(torch.int16).max else torch.int32
        self.dispatch: Choose = torch.compiler.disable(self._dispatch)  # type: ignore[assignment]

    def take(self) -> list[Tensor]:
        """What was recorded; it is no longer held here."""
        ids, self.ids = self.ids, []
        return ids

    def _dispatch(self, live_TK: Tensor, logits_TE: Tensor) -> Dispatch:
        """The choice itself. That of a recompute is one that was recorded in its forward."""
        if recomputes():
            _refuse_late("", self.before, logits_TE)
        else:
            self.ids.append(live_TK.detach().to(self._dtype))  # always a copy: a router's ids are int64
        return Dispatch(live_TK)

    def __reduce__(self):  # a copied model records nothing
        return type(None), ()


class ReplayedCalls:
    """Gives a router what was recorded, call after call; a recompute gets what its own forward got.

    A recompute does not say which forward it belongs to. Where several may be meant, it is the one whose logits were
    the nearest: the same, but for a kernel that adds up in another order.

    Args:
        name: of the router, for errors.
        recorded: ids (T, K) of each call, on any device; a row of -1 is a token of which nothing is known: it goes
            where the router chooses.

    >>> calls = ReplayedCalls("gate", [torch.tensor([[2, 1], [-1, -1]])])
    >>> calls.dispatch(torch.tensor([[0, 1], [0, 1]]), torch.zeros(2, 4))
    Dispatch(ids_TK=tensor([[2, 1],
            [0, 1]]), replayed_T2=tensor([[2., 1.],
            [0., 0.]], dtype=torch.float64))
    """

    def __init__(self, name: str, recorded: Sequence[Tensor]) -> None:
        self.name, self._recorded = name, recorded
        self._given: list[_Given] = []
        self.before: list[_Given] = []  # of contexts that are over: their recompute may still come
        self._has_graph = False  # a forward with gradient was given a record: its backward may recompute it
        self._leaves: Any = None  # where the context is over: the router to take oneself away from
        self.dispatch: Choose = torch.compiler.disable(self._dispatch)  # type: ignore[assignment]

    @property
    def left_over(self) -> int:
        """How many recorded calls the router has not made."""
        return len(self._recorded) - len(self._given)

    @property
    def ended(self) -> bool:
        """Whether the context is over."""
        return self._leaves is not None

    def end(self, router: Any) -> None:
        """The context is over. Stays at a router whose backward may still come, to tell one that recomputes.

        That of a reentrant checkpoint has no graph in its forward: while a router trains, it may come.
        """
        if self._has_graph or router.training:
            self.before = [*self.before, *(given.without_ids() for given in self._given)][-MOST:]
        elif not self.before:
            router.routing_calls = None
        self._leaves, self._recorded, self._given = router, [], []

    def _dispatch(self, live_TK: Tensor, logits_TE: Tensor) -> Dispatch:
        """What was recorded for this call.

        Raises InputError for more calls, other tokens or another K than were recorded, StateError for a recompute that
        comes after the context.
        """
        again = recomputes()
        if self.ended:
            if again:  # of a replayed forward, or of one that chose for itself
                _refuse_late(self.name, self.before, logits_TE)
            else:
                self._leaves.routing_calls = None
            return Dispatch(live_TK)
        given = self._given_before(logits_TE) if again else self._next(live_TK, logits_TE)
        ids_TK = given.ids_TK.to(live_TK.device, torch.int64, non_blocking=True)
        known_T1 = ids_TK[:, :1] >= 0
        ids_TK = torch.where(known_T1, ids_TK, live_TK)
        one_TK = ids_TK < logits_TE.shape[-1]  # an id of E is none
        missed_TK = (ids_TK.unsqueeze(2) != live_TK.unsqueeze(1)).all(dim=2) & one_TK
        return Dispatch(ids_TK, torch.stack([(known_T1 & one_TK).sum(dim=1), missed_TK.sum(dim=1)], dim=1).double())

    def _next(self, live_TK: Tensor, logits_TE: Tensor) -> _Given:
        number = len(self._given)
        if number >= len(self._recorded):
            raise InputError(
                expected=f"{number} calls of router {self.name!r}, as many as were recorded",
                got="one more",
                do="record each forward that is replayed; enter replay_routing again to replay it a second time",
            )
        ids_TK = self._recorded[number]
        if ids_TK.shape != live_TK.shape:
            raise InputError(
                expected=f"tokens and K as recorded in call {number} of router {self.name!r}: {tuple(ids_TK.shape)}",
                got=str(tuple(live_TK.shape)),
                do="replay the batch that was recorded, padding included; RoutingRecord.tokens() and .joined() "
                "rearrange a record for another",
            )
        self._has_graph = self._has_graph or torch.is_grad_enabled()
        self._given.append(_Given(ids_TK, _fingerprint(logits_TE), len(ids_TK)))
        return self._given[-1]

    def _given_before(self, logits_TE: Tensor) -> _Given:
        alike = [given for given in self._given if given.tokens == len(logits_TE)]
        if late := [given for given in self.before if given.tokens == len(logits_TE)]:
            _refuse_late(self.name, late, logits_TE, but=alike)
        if not alike:
            raise StateError(
                expected=f"the forward of router {self.name!r} inside replay_routing, and its recompute too",
                got=f"a recompute with {len(logits_TE)} tokens whose forward came before",
                do="open the with block around the forward as well",
            )
        if len(alike) == 1:
            alike[0].recomputed = True
            return alike[0]
        own_E = _fingerprint(logits_TE)
        far_C = (torch.stack([given.logits_E.to(own_E.device) for given in alike]) - own_E).abs().sum(dim=1)
        nearest = [given for given, far in zip(alike, (far_C <= far_C.min()).tolist(), strict=True) if far]
        if not all(torch.equal(nearest[0].ids_TK, other.ids_TK) for other in nearest[1:]):
            raise StateError(
                expected="forwards that can be told apart by their logits, for activation checkpointing",
                got=f"{len(nearest)} of router {self.name!r} with the same logits and other recorded ids",
                do="replay each of them in a with block of its own, backward included",
            )
        nearest[0].recomputed = True
        return nearest[0]

    def __reduce__(self):  # a copied model replays nothing
        return type(None), ()


@dataclass
class _Given:
    """A call that was given its record; once its context is over, without it."""

    ids_TK: Tensor
    logits_E: Tensor
    tokens: int
    recomputed: bool = False

    def without_ids(self) -> _Given:
        return _Given(self.ids_TK.new_empty(0), self.logits_E, self.tokens, self.recomputed)  # no view of a record


def _refuse_late(name: str, late: Sequence[_Given], logits_TE: Tensor, but: Sequence[_Given] = ()) -> None:
    """Raises StateError where a recompute is that of a forward whose context is over, and not of one of ``but``."""
    late = [given for given in late if given.tokens == len(logits_TE)]
    if not late:
        return
    own_E, spread_E = _fingerprint(logits_TE), _spread(logits_TE)

    def far(given: _Given) -> float:
        return float(((given.logits_E.to(own_E.device) - own_E).abs() / spread_E).max())

    nearest = min(map(far, late))
    if nearest <= NEAR and all(nearest <= far(given) for given in but):
        raise StateError(
            expected="backward inside replay_routing, where activation checkpointing runs the routers again",
            got=f"a recompute{f' of router {name!r}' if name else ''} after its end: other experts would answer",
            do="call backward() inside the with block",
        )


@torch.no_grad()
def _fingerprint(logits_TE: Tensor) -> Tensor:
    """(E,) a sum over tokens that knows their order."""
    z_TE = logits_TE.detach().double().nan_to_num(neginf=0.0)
    place_T1 = torch.linspace(1, 2, len(z_TE), dtype=z_TE.dtype, device=z_TE.device).unsqueeze(1)
    return (place_T1 * z_TE).sum(dim=0)


@torch.no_grad()
def _spread(logits_TE: Tensor) -> Tensor:
    """(E,) how far the sums of two unlike batches lie apart."""
    z_TE = logits_TE.detach().double().nan_to_num(neginf=0.0)
    return z_TE.square().sum(dim=0).sqrt().clamp(min=torch.finfo(torch.float64).tiny)
