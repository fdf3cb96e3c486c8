"""The tensors of one router: what forward proposed, what backward confirmed, and the coefficients that backward reads.

A plain attribute of a router, neither Parameter nor buffer: optimizers, DDP's buffer broadcast and checkpoints do not
see it. All statistics are additive and fp64, so counts are exact to 2^53 and one sum over micro-batches and ranks is
all it takes. Legend: T tokens, B sequences, S tokens a sequence, E experts, N loss terms.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .spec import Plan
from .token_layout import TokenPlacement

__all__ = ["ForwardPass", "Meter", "Tables", "Taken", "clear_slots", "gathered", "overwrite", "recomputes", "take"]


class Tables(NamedTuple):
    """What one call of a router shares with the ranks that hold other parts of its B sequences.

    C = 1, the dispatched choices, or 2 with the unbiased ones behind; R rows of documents, numbered by ``document_T``.
    """

    counts_CBE: Tensor
    probs_BE: Tensor
    counts_CRE: Tensor | None
    probs_RE: Tensor | None
    document_T: Tensor | None


class Taken(NamedTuple):
    """What forward proposed at L routers of one plan for one micro-batch, on this rank."""

    statistics_LS: Tensor  # (L, plan.forward_size), added up over the calls of each router
    gram_LEE: Tensor | None  # where the plan has one
    tables: list[list[Tables]]  # of each router, one per call
    placed: list[list[TokenPlacement]]  # of each router, one per call with gradient, where it is another library's
    passes: int = 1  # forwards of the model


def recomputes() -> bool:
    """Whether this forward runs inside a backward, for gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


class ForwardPass:
    """How a part of the model is being run: set around its forward, shared by its meters."""

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

    def __reduce__(self):  # of a copied model: nobody is told
        return ForwardPass, ()

    @property
    def _is_a_pass(self) -> bool:
        """With gradient, and no recompute; in a compiled graph nobody can look."""
        if self.passes is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return torch._C._current_graph_task_id() == -1


class Meter:
    """The tensors of one router. ``leaf.grad`` collects what backward counted; ``slots`` what forward proposed.

    ``pressure`` keeps its address for life: compiled graphs and saved tensors hold it, and the tap writes it late.
    """

    def __init__(self, plan: Plan, device: torch.device | str = "cpu", name: str = "") -> None:
        self.plan, self.name = plan, name
        self.evaluation: Tensor | None = None  # (to_look.forward_size,) while `Balancer.evaluation` runs
        self.forward_pass = ForwardPass()
        self.at_once = True  # a guard in forward may raise where it stands: see `equipoise.balancer.faults`
        self._make(device)
        self.tables: list[list[Tables]] = [[], [], []]
        self.placed: list[TokenPlacement] = []  # calls since the last tap, for their recompute
        self.late: list = []  # per call, what the tap made of its tables: see `equipoise.autograd.sequence_shards`
        self.placed_late: list[TokenPlacement] = []  # the calls that the running backward may recompute
        self.key = _METERS.enter(self)
        self.pool: list[Tensor] | None = None  # expert ids of a counting pass, kept for the shuffle control only
        self.owner: object = None  # the balancer: it has to live as long as the model it balances

    def _make(self, device: torch.device | str) -> None:
        plan, fp64 = self.plan, {"dtype": torch.float64, "device": device}
        self.leaf = torch.zeros(plan.size, **fp64, requires_grad=True)
        self.language = torch.zeros(1, **fp64, requires_grad=True)  # the same for what a probe measures: see Plan
        self.pressure = torch.zeros(plan.pressure_size, **fp64)
        self.written = self.pressure.data  # the same memory: a late write here does not trip autograd's version counter
        # The first pass of a reentrant checkpoint runs without gradient and must still be seen by the tap, while a
        # whole model run without gradient (a reference model, an evaluation) must not mix with either: three slots.
        self.bad_documents = torch.zeros(1, **fp64)  # document numbers out of range, where nobody could look at once
        square = (plan.num_experts, plan.num_experts) if plan.gram else (0, 0)
        self.slots = [torch.zeros(plan.forward_size, **fp64) for _ in range(3)]
        self.grams = [torch.zeros(square, **fp64) for _ in range(3)]

    def sees(self, *, training: bool) -> bool:
        """Whether a forward in this mode is measured; who only looks has seen what runs again in backward."""
        return not (self.plan.looks and recomputes()) if training else self.evaluation is not None

    @staticmethod
    def of(key: int) -> Meter:
        """The meter with this ``key``: how an operator inside a compiled graph finds it."""
        return _METERS.meters[key]

    @property
    def which_slot(self) -> int:
        """0 with gradient, 1 without inside a pass that has it (reentrant checkpoint), 2 a pass without."""
        return 0 if torch.is_grad_enabled() else 2 if self.forward_pass.without_grad else 1

    @torch.inference_mode(False)  # what is made in it could not be written later
    def move(self, device: torch.device) -> None:
        """Follows the model to another device, statistics included."""
        if self.leaf.is_meta:  # attached before the model had memory: nothing was measured yet
            self._make(device)
            self.pressure[-1] = 1.0  # as a new step begins: counting needs no tap
            return
        for name in ("leaf", "language"):
            leaf: Tensor = getattr(self, name)
            moved = leaf.detach().to(device).requires_grad_()
            moved.grad = None if leaf.grad is None else leaf.grad.to(device)
            setattr(self, name, moved)
        self.pressure = self.pressure.to(device)
        self.written, self.bad_documents = self.pressure.data, self.bad_documents.to(device)
        self.slots, self.grams = [s.to(device) for s in self.slots], [g.to(device) for g in self.grams]
        self.evaluation = None if self.evaluation is None else self.evaluation.to(device)

    def __deepcopy__(self, memo: dict) -> None:
        """A copied model (an EMA, a teacher) is not balanced by anybody: its routers get no meter."""
        return

    def __reduce__(self):
        return type(None), ()  # the same for pickled models


def take(meters: Sequence[Meter]) -> Taken:
    """The micro-batch that just went forward through the routers of one plan; empties their slots."""
    plan = meters[0].plan
    device = meters[0].leaf.device
    slots_3LS = gathered([slot for which in range(3) for slot in (m.slots[which] for m in meters)], device)
    slots_3LS = slots_3LS.view(3, len(meters), -1)
    ran_3L1 = slots_3LS.select(2, plan.at("calls")).unsqueeze(-1) > 0

    def first_that_ran(of_3: Tensor, ran_3: Tensor) -> Tensor:
        (ran, again, _), (one, other, last) = ran_3.unbind(), of_3.unbind()
        return torch.where(ran, one, torch.where(again, other, last))

    gram_LEE = None
    if plan.gram:
        grams_3LEE = torch.stack([gathered([m.grams[which] for m in meters], device) for which in range(3)])
        gram_LEE = first_that_ran(grams_3LEE, ran_3L1.unsqueeze(-1))
    tables = [next((tables for tables in m.tables if tables), []) for m in meters]
    taken = Taken(first_that_ran(slots_3LS, ran_3L1), gram_LEE, tables, [m.placed for m in meters])
    clear_slots(meters)
    return taken


def gathered(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Stacked on one device: layers that were together when a balancer was made may lie apart since.

    >>> gathered([torch.zeros(2), torch.ones(2)], torch.device("cpu")).shape
    torch.Size([2, 2])
    """
    return torch.stack([tensor.to(device) for tensor in tensors])


def overwrite(tensors: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> None:
    """Writes into many tensors at once, zeros without ``values``; they keep their addresses."""
    if values is None:
        torch._foreach_zero_(tensors)  # type: ignore[reportPrivateImportUsage]
    else:
        torch._foreach_copy_(tensors, values)  # type: ignore[reportPrivateImportUsage]


def clear_slots(meters: Sequence[Meter], first: int = 0) -> None:
    """Forgets what forward proposed, from slot number ``first`` on."""
    if not meters:
        return
    overwrite([slot for m in meters for slot in m.slots[first:]])
    if meters[0].plan.gram:
        overwrite([gram_EE for m in meters for gram_EE in m.grams[first:]])
    for meter in meters:
        meter.tables[first:] = [[] for _ in meter.tables[first:]]
        meter.placed = meter.placed if first else []


class _Meters:
    """Every meter by its number, for as long as it lives."""

    def __init__(self) -> None:
        self.meters: weakref.WeakValueDictionary[int, Meter] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def enter(self, meter: Meter) -> int:
        key = next(self._numbers)
        self.meters[key] = meter
        return key


_METERS = _Meters()
