"""Inside a training step: the start of each backward binds, guards look at what happened between, the step commits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn

from ..autograd.router_state import AwaitedSum, clear_pending, stack_on
from ..autograd.sequence_shards import sum_shards
from ..devices import host_readable
from ..distributed import Ranks
from ..errors import EquipoiseError, StateError
from ..policies.schedule import Schedule
from ..torch_internals import current_backward, is_whole_backward, queue_after_backward
from .attach import unbalanced_routers
from .checks import check_before_step, check_step_sums, no_router_ran
from .coefficients import MicroStep, micro_batch_coefficients
from .declared_step import DeclaredStep
from .estimator_error import estimator_error, estimator_error_sums
from .faults import DeferredRead, Faults, gradients_moved, undeclared_sum
from .forward_hooks import ForwardHooks
from .forward_passes import ForwardPasses
from .layer_group import Layer, LayerGroup, MicroBatchCoefficients, group_layers
from .metrics import StepStats
from .reduction import StepReduction, rows_of
from .step_detector import StepDetector
from .tap import Coefficients, TappedForward

__all__ = ["StepCycle"]

UNTAPPED = 3  # optimizer steps in a row before which nothing was tapped: more is a loop that forgot the tap


class StepCycle:
    """What a backward and an optimizer call; `Balancer` adds what a user calls.

    State changes in one place, ``_commit``.
    """

    def __init__(
        self,
        parts: Sequence[nn.Module],
        layers: Sequence[Layer],
        schedule: Schedule,
        ranks: Ranks,
        faults: Faults,
        *,
        reduction: str,
        estimators: Sequence[str],
    ) -> None:
        """Raises ConfigError on every rank where ranks that should hold the same layers do not."""
        self._parts, self._layers, self._schedule = parts, layers, schedule
        self._ranks, self._faults, self._reduction, self._estimators = ranks, faults, reduction, estimators
        self._groups = group_layers(layers)  # layers that measure alike, so that one operation serves all of them
        self._sums = StepReduction(layers, self._groups, ranks, self._device)
        self._step = 0
        self._skipped = 0
        self._assumed_dropped = False  # gradients of this step were taken for dropped
        self._dropped = 0  # micro-batches in a row whose gradients vanished without a step
        self._micro_steps = [0] * len(self._parts)
        self._micro_passes = [0] * len(self._parts)  # forwards that these are made of
        self._forwardless_taps: Tensor | None = None  # taps of this step before which no router ran, where a GPU knows
        self._evaluated = False  # a loss of a model in evaluation was to be tapped
        self._evaluating = False  # inside `Balancer.evaluation`
        self._untapped = 0  # steps in a row before which nothing was tapped
        self.generation = 0  # rises when a step is over or given up: what was bound before is of no use then
        self._backward: int | None = None  # the backward that was bound and has not ended
        self._pending: Callable[[], list[Tensor]] | None = None  # the sum of this step, on its way
        self._unmoved: DeferredRead | None = None  # whether the last step changed nothing, on its way from a GPU
        self._prepared = False  # what comes right before the optimizer's step was done
        self._may_commit: Tensor | bool | None = None  # where that is known before the step
        self._declared = DeclaredStep()
        self._committed: list[StepStats] | None = None
        self._estimator_error: dict[str, dict[str, float]] | None = None
        self._awaited = AwaitedSum()  # of the running backward
        for layer in layers:
            layer.balance_state.awaited = self._awaited
        self._passes = [ForwardPasses(self._groups_of(part)) for part in range(len(self._parts))]
        self._forwards = ForwardHooks(self._parts, self._layers, self._passes)
        self._detector = StepDetector(self._parts, self._layers)

    # ---------------------------------------------------------------- backward and the optimizer call these

    def start_backward(self, scale: Tensor, forward: TappedForward) -> Coefficients:
        """Adds a micro-batch to the step and begins one sum over ranks at most; what is returned waits for it."""
        part, taken = forward
        groups = self._groups_of(part)
        self._check_between()
        self._awaited.finish()  # of another tap in the same backward
        self._micro_steps[part] += 1
        number = self._micro_steps[part]
        self._micro_passes[part] += taken[0].passes
        for passes in self._passes:
            passes.hold()
        self._untapped = 0
        declared, ranks = self._declared, self._ranks.data
        if self._reduction == "sum" and declared.tokens is None and groups[0].counted is None:
            self._faults.note(undeclared_sum())
        if not is_whole_backward():
            for group in groups:
                group.step_split = True
        counts = [group.histories.loads(one.statistics_LS) for group, one in zip(groups, taken, strict=True)]
        counted = groups[0].counted is not None
        needs = self._schedule.counts_needed(self._step, number, counted=counted, measuring=bool(self._estimators))
        if needs == "none" or (needs == "step" and ranks.size == 1):
            counts_of = lambda: counts  # noqa: E731, nothing to wait for
        else:
            if needs == "step":
                before = [group.histories.local for group in groups]
                counts = [one if old is None else old + one for one, old in zip(counts, before, strict=True)]
            counts_of = self._sums.start_counts(counts)
        about = (self._reduction, declared.tokens, declared.micro_batches, ranks.size, ranks.rank, self._estimators)
        micro = MicroStep(self._step, number, *about, taken[0].passes, needs)
        of_layers = sum_shards([calls for one in taken for calls in one.shard_counts], self._ranks.sequence_shards)

        @cache
        def coefficients() -> list[MicroBatchCoefficients]:
            sharded = iter(of_layers)
            return [
                micro_batch_coefficients(
                    group, self._schedule, one, [next(sharded) for _ in group.layers], loads_LX, micro, scale
                )
                for group, one, loads_LX in zip(groups, taken, counts_of(), strict=True)
            ]

        return coefficients

    def write_coefficients(
        self, forward: TappedForward, coefficients: Coefficients, scale: Tensor, *, count: bool
    ) -> None:
        """At once, or at the first router's backward: until then a sum over ranks travels beside the head's backward.

        A compiled graph reads at an address and calls nothing, and counts of shards are looked up: then at once.
        """
        groups = self._groups_of(forward.part)

        def write() -> None:
            for group, one in zip(groups, coefficients(), strict=True):
                group.write_coefficients(one, scale, count=count)

        self._awaited.put(write)
        if self._ranks.data.size > 1 == self._ranks.sequence_shards.size and all(one.eager for one in forward.taken):
            for group, one in zip(groups, forward.taken, strict=True):
                group.place(one.placed)
        else:
            self._awaited.finish()
        self._backward = current_backward()

    def end_backward(self) -> None:
        """Drops what the recompute measured a second time, and zeroes the coefficients."""
        self._awaited.finish()  # where no router's backward ran
        self._backward = None
        self._clear_pending()
        for group in self._groups:
            group.zero_coefficients()
        self._detector.backward_ended()
        if self._detector.stepped_in_backward:
            self._commit()

    def _clear_pending(self, first: int = 0) -> None:
        for group in self._groups:
            clear_pending(group.states, first)

    def _forget_passes(self) -> None:
        for passes in self._passes:
            passes.forget()

    def _groups_of(self, part: int) -> list[LayerGroup]:
        return [group for group in self._groups if group.part == part]

    @property
    def _device(self) -> torch.device:
        if self._groups:
            return self._groups[0].device
        return next((p.device for part in self._parts for p in part.parameters()), torch.device("cpu"))

    # ---------------------------------------------------------------- guards

    def _check_between(self) -> None:
        """What happened since the last micro-batch: an error, dropped gradients, a step that nobody told of."""
        self._ranks.check_default()
        self._drop_what_failed()
        try:
            self._drop_if_gradients_were()
            self._detector.check_no_unseen_step(sum(self._micro_steps), steps_seen=self._step)
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

    def _note_missing_forward(
        self, groups: Sequence[LayerGroup], statistics: Sequence[Tensor], error: StateError
    ) -> None:
        """No router ran before a tap, or in a counting pass; where that cannot be looked at a flag says so."""
        if all(host_readable(one_LS.device) for one_LS in statistics):
            if no_router_ran(groups, statistics):
                self._faults.note(error)
            return
        calls = [group.spec.scalar(one_LS, "calls").sum() for group, one_LS in zip(groups, statistics, strict=True)]
        silent = (stack_on(calls, self._device).sum() == 0).double()
        self._forwardless_taps = silent if self._forwardless_taps is None else self._forwardless_taps + silent

    def _drop_if_gradients_were(self, *, begins: bool = False) -> None:
        """A step that was skipped (GradScaler) or zeroed leaves no trace here either.

        A step that was declared is not over before its last micro-batch, whatever an engine does with gradients.
        """
        taps, declared = max(self._micro_steps), self._declared
        if not taps or (not begins and taps < (declared.micro_batches or 0)):
            return
        if self._detector.gradients_were_dropped():
            self._skipped += not self._detector.inside_closure
            self._dropped += not self._detector.inside_closure
            self._forget()
            self._assumed_dropped = True
            if self._detector.inside_closure:  # the same step again (LBFGS): what was declared for it still holds
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
        if self._backward is None or self._backward == current_backward():
            return
        if self._detector.has_gradients:
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
        return not any(self._micro_steps) and all(
            layer.balance_state.grad_accumulator.grad is None for layer in self._layers
        )

    def _is_no_step(self) -> bool:
        """Whether an optimizer steps without anything of ours: to make its state, after discard(), for another loss.

        Several ranks agree on that in the step's sum: one that stayed away would answer it with that of its next step.
        """
        if not self._empty or self._evaluated or self._faults.noted is not None:
            return False
        self._untapped += 1
        return self._untapped < UNTAPPED and self._ranks.all.size == 1

    def _before_step(self) -> None:
        """Right before the optimizer: all gradients are there, so the sum may travel while the optimizer works."""
        if not self._schedule and self._empty:  # forwards of another loss, which no backward of ours will take
            self._clear_pending()
            self._forget_passes()
        if self._is_no_step():
            self._prepared = True
            return
        empty = self._empty if self._layers else None
        if self._layers and not (empty and 0 < self._untapped < UNTAPPED):
            about = (self._layers, self._schedule, self._step, self._micro_steps, self._declared.micro_batches)
            try:
                check_before_step(*about)
            except StateError as error:
                self._faults.note(error)
        if self._assumed_dropped and self._detector.gradients_are_gone:
            self._detector.gradients_leave = True
            self._faults.note(gradients_moved())
        passes = max(self._micro_passes) if self._layers else 0
        start = self._sums.start(self._faults.tail(self._forwardless_taps, passes, empty=empty, device=self._device))
        self._may_commit = (
            self._judge(start()) if self._faults.raises_immediately and host_readable(self._device) else None
        )
        self._pending, self._prepared = start, True

    def _judge(self, sums: list[Tensor]) -> Tensor | bool:
        data_ranks = self._ranks.data.size
        return check_step_sums(self._faults, self._sums.tables, sums, self._declared, data_ranks, self._step)

    def _step_inside_backward(self) -> None:
        """An optimizer steps inside a backward: at the end of that one the step is over, all layers have counted."""
        if self._backward is None:  # else the end of the tapped backward is ours anyway
            queue_after_backward(self._end_untapped)

    def _end_untapped(self) -> None:
        if self._detector.stepped_in_backward:
            self._commit()

    def _commit(self) -> None:
        """The only place where state changes: one sum over ranks for all layers, then histories, biases, metrics."""
        if not self._prepared:  # a closure optimizer, a step inside backward, or step() by hand
            self._before_step()
        self._prepared = False
        if self._pending is None:
            return
        (*sums, tail), self._pending = self._pending(), None
        unmoved = self._detector.take_unmoved()
        try:
            good = self._judge([*sums, tail]) if self._may_commit is None else self._may_commit
        except EquipoiseError:
            self._forget()
            raise
        if self._empty and self._layers:  # on all ranks, or it would be a fault
            self._forget()
            return
        if self._unmoved is not None:
            self._skipped += int(self._unmoved.read()[0])
            self._unmoved = None
        if unmoved is not None and host_readable(unmoved.device):
            unmoved = bool(unmoved)
            self._skipped += unmoved
        elif unmoved is not None:
            self._unmoved = DeferredRead(unmoved.double().unsqueeze(0))
        if isinstance(good, Tensor):
            if isinstance(unmoved, Tensor):
                good = good & ~unmoved.to(good.device)
            if unmoved is not True:
                self._commit_sums(sums, good)
        elif good and not unmoved:
            self._commit_sums(sums, None)
        self._step += 1
        self._untapped, self._dropped, self._assumed_dropped = 0, 0, False
        self._detector.saw_a_step()
        self._forget()

    def _commit_sums(self, sums: list[Tensor], keep: Tensor | None) -> None:
        decays = self._schedule.ema_decays | ({0.9} if self._estimators else set())
        tables = list(zip(self._sums.tables, sums, strict=True))
        mine = [
            (group, rows_of(summed, rows).to(group.device)) for table, summed in tables for group, rows in table.own
        ]
        if self._estimators:
            known = estimator_error_sums(
                self._estimators, [(group.step_errors, group.counts(summed)) for group, summed in mine]
            )
            self._estimator_error = estimator_error(self._estimators, self._ranks.all.sum(known))
        with torch.no_grad():
            for group, summed in mine:
                good = None if keep is None else keep.to(group.device)
                group.move_biases(self._schedule, summed, self._step, good)
                group.move_coefficients(self._schedule, summed, self._step, good)
                group.histories.commit(summed, decays, good)
        if keep is not None:  # of a bad step, which is said one step later, nothing is to be seen
            before = [None] * len(tables) if self._committed is None else [one.sums for one in self._committed]
            tables = [
                (table, torch.where(keep, summed, torch.zeros_like(summed) if old is None else old))
                for (table, summed), old in zip(tables, before, strict=True)
            ]
        self._committed = [
            StepStats(
                table.spec, table.places, summed, [(rows, g.biases(), g.drift, dict(g.coefs)) for g, rows in table.own]
            )
            for table, summed in tables
        ]

    def _forget(self) -> None:
        for group in self._groups:
            group.forget_step()
        self._forget_passes()
        self._micro_passes = [0] * len(self._micro_passes)
        if self._pending is not None:  # others take part in it
            self._pending()
        self._awaited.drop()
        self._pending = self._backward = self._forwardless_taps = self._may_commit = None
        self._evaluated = self._prepared = False
        self._micro_steps = [0] * len(self._micro_steps)
        self.generation += 1
        self._declared = DeclaredStep()
        self._detector.step_is_over()
