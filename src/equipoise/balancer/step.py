"""Inside a training step: the start of each backward binds, guards look at what happened between, the step commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..autograd.router_state import clear_slots, gathered
from ..autograd.sequence_shards import sum_tables
from ..devices import at_hand
from ..distributed import Ranks
from ..errors import EquipoiseError, StateError
from ..policies.losses import AuxLoss
from ..policies.switch import Timed, losses_at
from .attach import unbalanced_routers
from .checks import check_before_step, saw_nothing
from .coefficients import MicroStep, bind
from .estimator_error import fidelity, fidelity_sums
from .faults import Faults, Letter, gradients_moved
from .forward_hooks import Forwards
from .forward_passes import Passes
from .layer_group import Bank, Bound, Layer, banks_of
from .metrics import Committed
from .reduction import Ledger, rows_of
from .step_detector import Watch
from .step_tokens import Declared
from .tap import MicroBatch
from .verdicts import judge

__all__ = ["Stepping"]

UNTAPPED = 3  # optimizer steps in a row before which nothing was tapped: more is a loop that forgot the tap


class Stepping:
    """What a backward and an optimizer call; `Balancer` adds what a user calls.

    State changes in one place, ``_commit``.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        layers: Sequence[Layer],
        timeline: Sequence[Timed],
        ranks: Ranks,
        faults: Faults,
        *,
        reduction: str,
        estimators: Sequence[str],
    ) -> None:
        """Raises ConfigError on every rank where ranks that should hold the same layers do not."""
        self._parts, self._layers, self._timeline = parts, layers, timeline
        self._ranks, self._faults, self._reduction, self._estimators = ranks, faults, reduction, estimators
        self._banks = banks_of(layers)  # layers that measure alike, so that one operation serves all of them
        self._ledger = Ledger(layers, self._banks, ranks, self._device)
        self._step = 0
        self._skipped = 0
        self._inferred = False  # gradients of this step were taken for dropped
        self._dropped = 0  # micro-batches in a row whose gradients vanished without a step
        self._micro_steps = [0] * len(self._parts)
        self._micro_passes = [0] * len(self._parts)  # forwards that these are made of
        self._silent: Tensor | None = None  # taps of this step before which no router ran, where a GPU knows
        self._evaluated = False  # a loss of a model in evaluation was to be tapped
        self._evaluating = False  # inside `Balancer.evaluation`
        self._untapped = 0  # steps in a row before which nothing was tapped
        self.generation = 0  # rises when a step is over or given up: what was bound before is of no use then
        self._backward: int | None = None  # the backward that was bound and has not ended
        self._pending: Callable[[], list[Tensor]] | None = None  # the sum of this step, on its way
        self._unmoved: Letter | None = None  # whether the last step changed nothing, on its way from a GPU
        self._ready = False  # what comes right before the optimizer's step was done
        self._good: Tensor | bool | None = None  # whether the step may be committed, where that is known before it
        self._declared = Declared()
        self._committed: list[Committed] | None = None
        self._fidelity: dict[str, dict[str, float]] | None = None
        self._passes = [Passes(self._of(part)) for part in range(len(self._parts))]
        self._forwards = Forwards(self._parts, self._layers, self._passes)
        self._watch = Watch(self._parts, self._layers)

    # ---------------------------------------------------------------- backward and the optimizer call these

    def bind(self, scale: Tensor, micro_batch: MicroBatch) -> list[Bound]:
        """The start of a backward: one collective at most, then what each router's backward will read."""
        part, taken = micro_batch
        banks = self._of(part)
        self._check_between()
        self._micro_steps[part] += 1
        self._micro_passes[part] += taken[0].passes
        for passes in self._passes:
            passes.hold()
        self._untapped = 0
        declared = self._declared
        if self._reduction == "sum" and declared.tokens is None and banks[0].counted is None:
            self._faults.note(
                StateError(
                    expected="the step's tokens, because the losses add up (reduction='sum')",
                    got="no begin_step",
                    do="call balancer.begin_step(tokens=...) before the first micro-batch",
                )
            )
        number, tokens = self._micro_steps[part], self._ranks.tokens
        about = (self._reduction, declared.tokens, declared.micro_batches, tokens.size, tokens.rank, self._estimators)
        micro = MicroStep(self._step, number, *about, passes=taken[0].passes)
        if not torch.autograd.Variable._execution_engine.is_checkpoint_valid():  # of chosen inputs
            for bank in banks:
                bank.step_split = True
        counts = [bank.counts(one.statistics_LS) for bank, one in zip(banks, taken, strict=True)]
        losses = losses_at(self._timeline, self._step)
        if self._estimators or any(loss.needs_current(counted=banks[0].counted is not None) for loss in losses):
            counts = self._ledger.sum_tokens(counts)
        summed = iter(sum_tables([tables for one in taken for tables in one.tables], self._ranks.shards))
        return [
            bind(bank, self._timeline, one, [next(summed) for _ in bank.layers], global_LE, micro, scale)
            for bank, one, global_LE in zip(banks, taken, counts, strict=True)
        ]

    def press(self, part: int, bound: list[Bound], scale: Tensor, *, count: bool) -> None:
        for bank, one in zip(self._of(part), bound, strict=True):
            bank.press(one, scale, count=count)
        self._backward = torch._C._current_graph_task_id()

    def end_backward(self) -> None:
        """Recompute proposed again what was already taken, and the push is done: forget both."""
        self._backward = None
        self._clear_slots()
        for bank in self._banks:
            bank.release()
        self._watch.backward_ended()
        if self._watch.stepped_in_backward:
            self._commit()

    def _clear_slots(self, first: int = 0) -> None:
        for bank in self._banks:
            clear_slots(bank.meters, first)

    def _forget_passes(self) -> None:
        for passes in self._passes:
            passes.forget()

    def _of(self, part: int) -> list[Bank]:
        return [bank for bank in self._banks if bank.part == part]

    @property
    def _device(self) -> torch.device:
        if self._banks:
            return self._banks[0].device
        return next((p.device for part in self._parts for p in part.parameters()), torch.device("cpu"))

    # ---------------------------------------------------------------- guards

    def _check_between(self) -> None:
        """What happened since the last micro-batch: an error, dropped gradients, a step that nobody told of."""
        self._ranks.check_default()
        self._drop_what_failed()
        try:
            self._drop_if_gradients_were()
            self._watch.check_no_unseen_step(sum(self._micro_steps), steps_seen=self._step)
        except StateError as error:
            self._faults.note(error)
            self._commit()  # the others are in the sum of that step, or will be: this rank joins it, and all say why

    def _check_routers(self) -> None:
        """Once a step. Raises StateError for a router that came after the balancer was made."""
        if not self._forwards.changed():
            return
        if names := unbalanced_routers(self._parts, self._layers):
            raise StateError(
                expected="the routers that were there when the balancer was made",
                got=f"{', '.join(map(repr, names[:3]))}, which nobody balances",
                do="state = balancer.state_dict(); balancer.remove(); make a new Balancer of the model and call its "
                "load_state_dict(state, strict=False)",
            )
        self._forwards.look()

    def _note_silence(self, banks: Sequence[Bank], statistics: Sequence[Tensor], error: StateError) -> None:
        """No router ran before a tap, or in a counting pass; where that cannot be looked at a flag says so."""
        if all(at_hand(one_LS.device) for one_LS in statistics):
            if saw_nothing(banks, statistics):
                self._faults.note(error)
            return
        calls = [one_LS[:, bank.plan.at("calls")].sum() for bank, one_LS in zip(banks, statistics, strict=True)]
        silent = (gathered(calls, self._device).sum() == 0).double()
        self._silent = silent if self._silent is None else self._silent + silent

    def _drop_if_gradients_were(self, *, begins: bool = False) -> None:
        """A step that was skipped (GradScaler) or zeroed leaves no trace here either.

        A step that was declared is not over before its last micro-batch, whatever an engine does with gradients.
        """
        taps, declared = max(self._micro_steps), self._declared
        if not taps or (not begins and taps < (declared.micro_batches or 0)):
            return
        if self._watch.gradients_were_dropped():
            self._skipped += not self._watch.inside_closure
            self._dropped += not self._watch.inside_closure
            self._forget()
            self._inferred = True
            if self._watch.inside_closure:  # the same step again (LBFGS): what was declared for it still holds
                self._declared = declared

    def _check_begins(self, what: str, *, do: str) -> None:
        self._drop_if_gradients_were(begins=True)
        if any(self._micro_steps):
            raise StateError(
                expected=f"{what} before the first micro-batch of a step",
                got=f"{max(self._micro_steps)} micro-batches already tapped",
                do=do,
            )

    def _drop_what_failed(self) -> None:
        """After an error inside a backward (out of memory) some layers have counted and some have not."""
        if self._backward is None or self._backward == torch._C._current_graph_task_id():
            return
        if self._watch.has_gradients:
            self._faults.note(
                StateError(
                    expected="each backward to end",
                    got=f"one that stopped on an error in micro-batch {max(self._micro_steps)}, with part of the "
                    "gradients",
                    do="call optimizer.zero_grad() and balancer.discard(), then repeat the step",
                )
            )
        self._skipped += 1
        self._forget()

    # ---------------------------------------------------------------- the step

    @property
    def _empty(self) -> bool:
        """Whether this rank has nothing to commit: no tap, no counted backward."""
        return not any(self._micro_steps) and all(layer.meter.leaf.grad is None for layer in self._layers)

    def _is_no_step(self) -> bool:
        """Whether an optimizer steps without anything of ours: to make its state, after discard(), for another loss.

        Several ranks agree on that in the step's sum: one that stayed away would answer it with that of its next step.
        """
        if not self._empty or self._evaluated or self._faults.noted is not None:
            return False
        self._untapped += 1
        return self._untapped < UNTAPPED and self._ranks.everyone.size == 1

    def _before_step(self) -> None:
        """Right before the optimizer: all gradients are there, so the sum may travel while the optimizer works."""
        if not self._timeline and self._empty:  # forwards of another loss, which no backward of ours will take
            self._clear_slots()
            self._forget_passes()
        if self._is_no_step():
            self._ready = True
            return
        empty = self._empty if self._layers else None
        if self._layers and not (empty and 0 < self._untapped < UNTAPPED):
            about = (self._layers, self._timeline, self._step, self._micro_steps, self._declared.micro_batches)
            try:
                check_before_step(*about)
            except StateError as error:
                self._faults.note(error)
        if self._inferred and self._watch.gradients_are_gone:
            self._watch.gradients_leave = True
            self._faults.note(gradients_moved())
        passes = max(self._micro_passes) if self._layers else 0
        start = self._ledger.start(self._faults.tail(self._silent, passes, empty=empty, device=self._device))
        self._good = self._judge(start()) if self._faults.at_once and at_hand(self._device) else None
        self._pending, self._ready = start, True

    def _judge(self, sums: list[Tensor]) -> Tensor | bool:
        data_ranks = self._ranks.tokens.size
        return judge(self._faults, self._ledger.sheets, sums, self._declared, data_ranks, self._step)

    def _step_inside_backward(self) -> None:
        """An optimizer steps inside a backward: at the end of that one the step is over, all layers have counted."""
        if self._backward is None:  # else the end of the tapped backward is ours anyway
            torch.autograd.Variable._execution_engine.queue_callback(self._end_untapped)

    def _end_untapped(self) -> None:
        if self._watch.stepped_in_backward:
            self._commit()

    def _commit(self) -> None:
        """The only place where state changes: one sum over ranks for all layers, then histories, biases, metrics."""
        if not self._ready:  # a closure optimizer, a step inside backward, or step() by hand
            self._before_step()
        self._ready = False
        if self._pending is None:
            return
        (*sums, tail), self._pending = self._pending(), None
        unmoved = self._watch.take_unmoved()
        try:
            good = self._judge([*sums, tail]) if self._good is None else self._good
        except EquipoiseError:
            self._forget()
            raise
        if self._empty and self._layers:  # on all ranks, or it would be a fault
            self._forget()
            return
        if self._unmoved is not None:
            self._skipped += int(self._unmoved.read()[0])
            self._unmoved = None
        if unmoved is not None and at_hand(unmoved.device):
            unmoved = bool(unmoved)
            self._skipped += unmoved
        elif unmoved is not None:
            self._unmoved = Letter(unmoved.double().unsqueeze(0))
        if isinstance(good, Tensor):
            if isinstance(unmoved, Tensor):
                good = good & ~unmoved.to(good.device)
            if unmoved is not True:
                self._commit_sums(sums, good)
        elif good and not unmoved:
            self._commit_sums(sums, None)
        self._step += 1
        self._untapped, self._dropped, self._inferred = 0, 0, False
        self._watch.saw_a_step()
        self._forget()

    def _commit_sums(self, sums: list[Tensor], keep: Tensor | None) -> None:
        losses = [t.policy for t in self._timeline if isinstance(t.policy, AuxLoss)]
        decays = {loss.decay for loss in losses if loss.estimator == "ema"} | ({0.9} if self._estimators else set())
        sheets = list(zip(self._ledger.sheets, sums, strict=True))
        mine = [(bank, rows_of(summed, rows).to(bank.device)) for sheet, summed in sheets for bank, rows in sheet.own]
        if self._estimators:
            known = fidelity_sums(
                self._estimators, [(bank.step_fidelity, bank.counts(summed)) for bank, summed in mine]
            )
            self._fidelity = fidelity(self._estimators, self._ranks.everyone.sum(known))
        with torch.no_grad():
            for bank, summed in mine:
                good = None if keep is None else keep.to(bank.device)
                bank.move_biases(self._timeline, bank.counts(summed), self._step, good)
                bank.history.commit(bank.counts(summed), decays, good)
        if keep is not None:  # of a bad step, which is said one step later, nothing is to be seen
            before = [None] * len(sheets) if self._committed is None else [one.sums for one in self._committed]
            sheets = [
                (sheet, torch.where(keep, summed, torch.zeros_like(summed) if old is None else old))
                for (sheet, summed), old in zip(sheets, before, strict=True)
            ]
        self._committed = [
            Committed(sheet.plan, sheet.places, summed, [(rows, bank.biases()) for bank, rows in sheet.own])
            for sheet, summed in sheets
        ]

    def _forget(self) -> None:
        for bank in self._banks:
            bank.forget_step()
        self._forget_passes()
        self._micro_passes = [0] * len(self._micro_passes)
        if self._pending is not None:  # others take part in it
            self._pending()
        self._pending = self._backward = self._silent = self._good = None
        self._evaluated = self._ready = False
        self._micro_steps = [0] * len(self._micro_steps)
        self.generation += 1
        self._declared = Declared()
        self._watch.step_is_over()
