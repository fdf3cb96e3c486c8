"""The tensors of one router: statistics that forward left, what backward confirmed, and the coefficients it reads.

A plain attribute of a router, neither Parameter nor buffer: optimizers, DDP's buffer broadcast and checkpoints do not
see it. All statistics are additive and fp64, so counts are exact to 2^53 and one sum over micro-batches and ranks is
all it takes. Legend: L layers, T tokens, B sequences, E experts, N loss terms, S statistics.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..torch_internals import copy_all, current_backward, zero_all
from .spec import StatsSpec
from .token_layout import TokenPlacement

__all__ = [
    "AwaitedSum",
    "ForwardPass",
    "ForwardStats",
    "RouterState",
    "ShardCounts",
    "clear_pending",
    "recomputes",
    "stack_on",
    "take_pending",
    "write_all",
]


class ShardCounts(NamedTuple):
    """What one call of a router shares with the ranks that hold other parts of its B sequences.

    C = 1, the dispatched choices, or 2 with the unbiased ones behind; R rows of documents, numbered by ``document_T``;
    ``tokens`` that are no padding.
    """

    tokens: Tensor
    counts_CBE: Tensor
    probs_BE: Tensor
    counts_CRE: Tensor | None
    probs_RE: Tensor | None
    document_T: Tensor | None


class ForwardStats(NamedTuple):
    """What forward measured at L routers of one spec for one micro-batch, on this rank."""

    statistics_LS: Tensor  # (L, spec.forward_size), added up over the calls of each router
    gram_LEE: Tensor | None  # where the spec has one
    shard_counts: list[list[ShardCounts]]  # of each router, one per call
    placed: list[list[TokenPlacement]]  # of each router, one per call with gradient, where it is another library's
    passes: int = 1  # forwards of the model
    eager: bool = False  # none of these routers is in a compiled graph, so what their backward reads may come late


def recomputes() -> bool:
    """Whether this forward runs inside a backward, for gradient checkpointing."""
    return not torch.compiler.is_compiling() and current_backward() != -1


class ForwardPass:
    """How a part of the model is being run: set around its forward, shared by the states of its routers."""

    without_grad = False
    passes: Any = None  # what is told of forwards with gradient: see `equipoise.balancer.forward_passes`

    def enter(self) -> None:
        self.without_grad = not torch.is_grad_enabled()
        if self._is_a_pass:
            self.passes.begins()

    def leave(self) -> None:
        self.without_grad = False
        if self._is_a_pass:
            self.passes.ends()

    def __reduce__(self):  # a copied model tells no balancer
        return ForwardPass, ()

    @property
    def _is_a_pass(self) -> bool:
        """With gradient, and no recompute; a compiled graph cannot tell."""
        if self.passes is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return current_backward() == -1


class AwaitedSum:
    """What a backward needs from a sum over ranks under way: finished at its first router, by one thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._finish: Callable[[], None] | None = None

    def put(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def drop(self) -> None:
        self._finish = None

    def finish(self) -> None:
        """Waits for the sum and does what depends on it, once."""
        if self._finish is None:
            return
        with self._lock:
            if self._finish is not None:
                try:
                    self._finish()
                finally:
                    self._finish = None  # only now: a thread that finds nothing to do goes on to read


class RouterState:
    """The tensors of one router.

    ``pending`` holds what forward measured until the tap takes it, ``grad_accumulator.grad`` collects what backward
    counted. ``grad_coefs`` keeps its address for life: compiled graphs and saved tensors hold it, and the tap writes it
    between forward and backward.
    """

    def __init__(self, spec: StatsSpec, device: torch.device | str = "cpu", name: str = "") -> None:
        self.spec, self.name = spec, name
        self.evaluation: Tensor | None = None  # (spec.observing.forward_size,) while `Balancer.evaluation` runs
        self.forward_pass = ForwardPass()
        self.raises_immediately = True  # a check in forward may raise where it stands: see `equipoise.balancer.faults`
        self._make(device)
        self.shard_counts: list[list[ShardCounts]] = [[], [], []]
        self.placed: list[TokenPlacement] = []  # calls since the last tap, for their recompute
        self.sharded_fractions: list = []  # per call, what the tap made of its counts: see `sequence_shards`
        self.recompute_placements: list[TokenPlacement] = []  # the calls that the running backward may recompute
        self.awaited = AwaitedSum()  # of the balancer
        self.eager = False  # a forward since the last tap was not compiled
        self.key = _REGISTRY.enter(self)
        self.pooled_ids: list[Tensor] | None = None  # expert ids of a counting pass, kept for the shuffle control only
        self.owner: object = None  # the balancer: it has to live as long as the model it balances

    def _make(self, device: torch.device | str) -> None:
        spec, fp64 = self.spec, {"dtype": torch.float64, "device": device}
        self.grad_accumulator = torch.zeros(spec.size, **fp64, requires_grad=True)
        self.lm_grad_accumulator = torch.zeros(1, **fp64, requires_grad=True)  # of `record_logit_grad`
        self.grad_coefs = torch.zeros(spec.coefs_size, **fp64)
        self.grad_coefs_raw = self.grad_coefs.data  # the same memory: no write here trips the version counter
        self.bad_documents = torch.zeros(1, **fp64)  # document numbers out of range, seen too late to raise
        # The first pass of a reentrant checkpoint runs without gradient and must still be seen by the tap, while a
        # whole model run without gradient (a reference model, an evaluation) must not mix with either: three of each.
        self.pending = [torch.zeros(spec.forward_size, **fp64) for _ in range(3)]
        square = (spec.num_experts, spec.num_experts) if spec.gram else (0, 0)
        self.pending_grams = [torch.zeros(square, **fp64) for _ in range(3)]

    def measures(self, *, training: bool) -> bool:
        """Whether a forward in this mode is measured; without a policy a recompute was measured in its forward."""
        return not (self.spec.observe_only and recomputes()) if training else self.evaluation is not None

    @staticmethod
    def of(key: int) -> RouterState:
        """The state with this ``key``: how an operator inside a compiled graph finds it."""
        return _REGISTRY.states[key]

    @staticmethod
    def alive(key: int | None) -> RouterState | None:
        """The same, None if there is none."""
        return None if key is None else _REGISTRY.states.get(key)

    @property
    def pending_index(self) -> int:
        """0 with gradient, 1 without inside a pass that has it (reentrant checkpoint), 2 a pass without."""
        return 0 if torch.is_grad_enabled() else 2 if self.forward_pass.without_grad else 1

    @torch.inference_mode(False)  # what is made in it could not be written later
    def move(self, device: torch.device) -> None:
        """Follows the model to another device, statistics included."""
        if self.grad_accumulator.is_meta:  # attached before the model had memory: nothing was measured yet
            self._make(device)
            self.spec.count_flag(self.grad_coefs).fill_(1.0)  # as a new step begins: counting needs no tap
            return
        for name in ("grad_accumulator", "lm_grad_accumulator"):
            accumulator: Tensor = getattr(self, name)
            moved = accumulator.detach().to(device).requires_grad_()
            moved.grad = None if accumulator.grad is None else accumulator.grad.to(device)
            setattr(self, name, moved)
        self.grad_coefs = self.grad_coefs.to(device)
        self.grad_coefs_raw, self.bad_documents = self.grad_coefs.data, self.bad_documents.to(device)
        self.pending = [one.to(device) for one in self.pending]
        self.pending_grams = [one.to(device) for one in self.pending_grams]
        self.evaluation = None if self.evaluation is None else self.evaluation.to(device)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model (an EMA, a teacher) has no balancer: its routers get no state."""
        return

    def __reduce__(self):
        return type(None), ()  # the same for pickled models


def take_pending(states: Sequence[RouterState]) -> ForwardStats:
    """The micro-batch that just went forward through the routers of one spec; clears what was pending."""
    spec, device = states[0].spec, states[0].grad_accumulator.device
    pending_3LS = stack_on([one.pending[which] for which in range(3) for one in states], device)
    pending_3LS = pending_3LS.view(3, len(states), -1)
    ran_3L1 = spec.scalar(pending_3LS, "calls").unsqueeze(-1) > 0

    def first_that_ran(of_3: Tensor, ran_3: Tensor) -> Tensor:
        (ran, again, _), (one, other, last) = ran_3.unbind(), of_3.unbind()
        return torch.where(ran, one, torch.where(again, other, last))

    gram_LEE = None
    if spec.gram:
        grams_3LEE = torch.stack([stack_on([one.pending_grams[which] for one in states], device) for which in range(3)])
        gram_LEE = first_that_ran(grams_3LEE, ran_3L1.unsqueeze(-1))
    shard_counts = [next((calls for calls in one.shard_counts if calls), []) for one in states]
    statistics_LS, eager = first_that_ran(pending_3LS, ran_3L1), all(one.eager for one in states)
    taken = ForwardStats(statistics_LS, gram_LEE, shard_counts, [one.placed for one in states], eager=eager)
    clear_pending(states)
    return taken


def stack_on(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stacked on one device: layers that were together when a balancer was made may have been moved apart.

    >>> stack_on([torch.zeros(2), torch.ones(2)], torch.device("cpu")).shape
    torch.Size([2, 2])
    """
    return torch.stack([tensor.to(device) for tensor in tensors])


def write_all(tensors: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> None:
    """Writes into many tensors at once, zeros without ``values``; they keep their addresses."""
    if values is None:
        zero_all(tensors)
    else:
        copy_all(tensors, values)


def clear_pending(states: Sequence[RouterState], first: int = 0) -> None:
    """Drops what forward measured, from pending number ``first`` on."""
    if not states:
        return
    write_all([pending for one in states for pending in one.pending[first:]])
    if states[0].spec.gram:
        write_all([gram_EE for one in states for gram_EE in one.pending_grams[first:]])
    for state in states:
        state.eager = state.eager and first > 0
        state.shard_counts[first:] = [[] for _ in state.shard_counts[first:]]
        state.placed = state.placed if first else []


class _Registry:
    """Every state by its number, for as long as it lives."""

    def __init__(self) -> None:
        self.states: weakref.WeakValueDictionary[int, RouterState] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def enter(self, state: RouterState) -> int:
        key = next(self._numbers)
        self.states[key] = state
        return key


_REGISTRY = _Registry()
