"""The balancer: binds policies to a model's routers at each backward and commits once per optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .attach import attach, detach
from .checks import check_before_step, check_tokens, saw_nothing
from .collectives import Ranks
from .errors import ConfigError, InputError, StateError
from .ledger import Ledger, rows_of
from .meter import Meter, clear_slots, take
from .policies.losses import AuxLoss
from .policies.switch import Policy, losses_at, timeline
from .pressure import Bank, Bound, MicroStep, banks_of, bind
from .readout import Committed, fidelity, fidelity_sums, metrics
from .rehearsal import rehearsing
from .shards import sum_tables
from .tap import MicroBatch, tapped
from .watch import Watch

__all__ = ["Balancer"]


class Balancer:
    """Keeps the experts of a model evenly loaded. One object, one line per step: ``loss = balancer.tap(loss)``.

    Args:
        model: any module with ``equipoise.layers.Router`` inside, or a MoE model of transformers; a list of the parts
            that this rank holds of one (interleaved and zero-bubble pipelines).
        policies: what measures and what pushes; their gradients add up (see ``equipoise.policies``).
        optimizer: whose step ends a step. Default: the torch optimizer that holds the routers' parameters.
        ranks: which ranks see different tokens, and hold other layers (see ``equipoise.collectives``). Default: all
            ranks of ``torch.distributed`` hold the same layers and see other sequences. All ranks make their balancer
            together, and tap equally often in a step.
        reduction: how the engine's losses of a step combine: "mean" (each is a mean; the engine averages them over
            micro-batches and ranks) or "sum" (they add up to the step's loss; needs ``begin_step(tokens=)``).
        sequences_per_micro_batch: for a loop that runs several micro-batches as one pass, which is often faster: scope
            "micro_batch" is then every so many sequences of a pass, as if each had run alone.
        example: arguments of forward, to find another library's routers with; models of transformers bring their own.
        measure_estimators: compare prefix, previous, ema and filled with the exact f at every step; see ``fidelity()``.
        gradient_norms: measure each policy's gradient against the language model's at the routers.

    Raises:
        ConfigError: no policy, no router, an unknown name, or a bias rule known to fail with the router's gate.
        StateError: the model already has a balancer; later, calls in an order that would train something else.

    >>> from equipoise import AuxLoss, Balancer, MoE
    >>> model = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> balancer = Balancer(model, [AuxLoss("global_batch", coef=1e-2)])
    >>> loss = balancer.tap(model(torch.randn(2, 6, 8)).square().mean())  # the identity; learns the scale of the loss
    >>> loss.backward()
    >>> optimizer.step()
    >>> balancer.metrics()["balance/tokens"]
    12.0
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        policies: Sequence[Policy],
        optimizer: torch.optim.Optimizer | None = None,
        *,
        ranks: Ranks | None = None,
        reduction: str = "mean",
        sequences_per_micro_batch: int | None = None,
        example: Mapping[str, Any] | None = None,
        measure_estimators: bool = False,
        gradient_norms: bool = True,
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ConfigError(
                expected="reduction: 'mean' or 'sum'", got=repr(reduction), do="most loops average: 'mean'"
            )
        self.policies = list(policies)
        self._timeline = timeline(self.policies)
        self._reduction = reduction
        parts = [model] if isinstance(model, nn.Module) else list(model)
        self._ranks = ranks or Ranks.default()
        self._layers = attach(
            parts,
            self._timeline,
            measure_estimators=measure_estimators,
            gradient_norms=gradient_norms,
            micro_sequences=sequences_per_micro_batch,
            shards=self._ranks.shards.size,
            may_be_empty=self._ranks.everyone.size > self._ranks.tokens.size,
            example=example,
        )
        self._banks = banks_of(self._layers)  # layers that measure alike, so that one operation serves all of them
        device = next((p.device for part in parts for p in part.parameters()), torch.device("cpu"))
        try:
            self._ledger = Ledger(self._layers, self._banks, self._ranks, device)
        except ConfigError:
            detach(self._layers)
            raise
        self._estimators = ("prefix", "previous", "ema", "filled") if measure_estimators else ()
        self._step = 0
        self._skipped = 0
        self._micro_steps = [0] * len(parts)
        self.generation = 0  # rises when a step is over or given up: what was bound before is of no use then
        self._backward: int | None = None  # the backward that was bound and has not ended
        self._pending: Callable[[], list[Tensor]] | None = None  # the sum of this step, on its way
        self._declared: tuple[float | None, int | None] = (None, None)
        self._committed: list[Committed] | None = None
        self._fidelity: dict[str, dict[str, float]] | None = None
        self._watch = Watch(parts, self._layers)
        self._watch.listen(self._before_step, self._commit, optimizer)
        for layer in self._layers:
            layer.meter.owner = self  # a balancer lives as long as its model, also when nobody else keeps it

    # ---------------------------------------------------------------- a training step, in order

    def begin_step(self, *, tokens: float | None = None, micro_batches: int | None = None) -> None:
        """Declares the valid router tokens of the coming step, over all ranks and micro-batches, for uneven batches.

        Without it every micro-batch weighs the same, which is exact when all have equally many tokens. With
        reduction "mean", ``micro_batches`` (per rank) is needed too, and checked at the step.
        """
        self._check_begins("begin_step", do="call it right after optimizer.step(); after a skipped step discard()")
        if tokens is not None and not tokens > 0:
            raise InputError(expected="tokens > 0", got=repr(tokens), do="count the router's valid tokens of the step")
        if tokens is not None and micro_batches is None and self._reduction == "mean":
            raise InputError(
                expected="micro_batches beside tokens, because the losses are means",
                got="tokens alone",
                do="begin_step(tokens=..., micro_batches=M), or Balancer(reduction='sum')",
            )
        self._declared = (tokens, micro_batches)

    @property
    def needs_counting(self) -> bool:
        """Whether a step of several micro-batches needs a counting pass: estimator "exact", scope "shuffle"."""
        return any(loss.needs_counting for loss in losses_at(self._timeline, self._step))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around one forward of every micro-batch of the step, before the step: no gradient, random numbers replayed.

        The model stays in training mode, so that dropout draws what it will draw again.
        """
        self._check_begins("the counting pass", do="count first, then train")
        for bank in self._banks:
            bank.forget_step()
        shuffle = any(isinstance(t.policy, AuxLoss) and t.policy.scope == "shuffle" for t in self._timeline)
        for layer in self._layers:
            layer.meter.pool = [] if shuffle else None
        # collecting every token's experts is a side effect that no compiler takes under a checkpoint
        stance = torch.compiler.set_stance("force_eager") if shuffle else nullcontext()
        try:
            with stance, torch.random.fork_rng(), torch.no_grad():
                yield
        except BaseException:
            self.discard()
            raise
        taken = [take(bank.meters).statistics_LS for bank in self._banks]
        if saw_nothing(self._banks, taken):
            raise StateError(
                expected="the step's micro-batches forward through the routers in training mode",
                got="a counting pass in which no router ran in training mode",
                do="call model.train() first; the pass itself needs no gradients",
            )
        for bank, counted_LS in zip(self._banks, self._ledger.sum_tokens(taken), strict=True):
            bank.counted = counted_LS
            bank.history.counted_E = bank.counts(counted_LS)
            pools = [meter.pool for meter in bank.meters if meter.pool]
            bank.pools = [self._ranks.tokens.gather_rows(torch.cat(pool)) for pool in pools]
            for meter in bank.meters:
                meter.pool = None

    def tap(self, loss: Tensor, *, scale: float | None = None) -> Tensor:
        """Returns ``loss`` unchanged. Its backward, which runs before every router's, binds the policies to the step.

        Args:
            loss: the scalar that the engine scales and calls backward on: the tap learns 1/M and GradScaler's scale
                from the gradient that arrives, so tap first and scale then: ``(tap(loss) / M).backward()``.
                Without gradient, or in evaluation, nothing happens.
            scale: for a pipeline stage without the loss: tap its output activations with the scale said explicitly.
        """
        if not (torch.is_grad_enabled() and loss.requires_grad):
            clear_slots(self._meters, first=2)  # and not a training forward whose loss is still to be tapped
            return loss
        part = self._watch.last_part
        banks = self._of(part)
        if not any(layer.router.training for bank in banks for layer in bank.layers):
            return loss
        if scale is None and loss.numel() != 1:
            raise InputError(
                expected="a scalar loss",
                got=f"shape {tuple(loss.shape)}",
                do="tap the mean loss, or pass scale= with a stage's activations",
            )
        taken = [take(bank.meters) for bank in banks]
        if rehearsing():  # what it proposed is taken, and forgotten
            return loss
        if saw_nothing(banks, [one.statistics_LS for one in taken]):
            raise StateError(
                expected="a forward of the routers in training mode before each tap",
                got="none since the last tap",
                do="tap each loss once, right after its own forward and before the next one",
            )
        return tapped(loss, self, MicroBatch(part, taken), scale)

    def discard(self) -> None:
        """Forgets the micro-batches since the last step: after out-of-memory, or with ``zero_grad`` without a step."""
        for bank in self._banks:
            bank.forget_step()
        if self._pending is not None:  # others take part in it
            self._pending()
        self._pending = self._backward = None
        self._micro_steps = [0] * len(self._micro_steps)
        self.generation += 1
        self._declared = (None, None)
        self._watch.step_is_over()

    # ---------------------------------------------------------------- what it learnt

    @property
    def step_count(self) -> int:
        """Optimizer steps committed so far."""
        return self._step

    def metrics(self) -> dict[str, float]:
        """The last committed step as flat names: loss and gradient_ratio per policy, MaxVio per scope, ...

        ``balance/policy_0/loss`` is 1 in balance; ``.../gradient_ratio`` is the norm of the policy's gradient at the
        router logits over that of the language-model loss; ``balance/maxvio_micro_batch`` and ``_sequence`` are means.
        """
        return metrics(self._last(), self._timeline, self._step - 1, self._skipped)

    def load(self) -> list[Tensor]:
        """Counts of the last committed global batch, one (E,) int64 tensor a layer."""
        rows = [(place, row) for one in self._last() for place, row in zip(one.places, one.counts.long(), strict=True)]
        return [counts_E for _, counts_E in sorted(rows, key=lambda row: row[0])]

    def fidelity(self) -> dict[str, dict[str, float]] | None:
        """Of the last step: each estimator's gradient against exact (relative_error, cosine); None if not measured."""
        return self._fidelity

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs and the model does not hold: the step, previous and ema loads, bias momentum.

        Micro-batches since the last step are left out, as their gradients are from every checkpoint.
        """
        states = {name: state for bank in self._banks for name, state in bank.state_dicts().items()}
        layers = {layer.name: states[layer.name] for layer in self._layers}
        return {"version": 1, "step": self._step, "skipped": self._skipped, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ConfigError when the state is of another model."""
        names = [layer.name for layer in self._layers]
        if state.get("version") != 1 or sorted(state["layers"]) != sorted(names):
            raise ConfigError(
                expected=f"the balancer state of routers {names}",
                got=f"version {state.get('version')} of {sorted(state.get('layers', ()))}",
                do="load the checkpoint of this model",
            )
        self.discard()
        self._step, self._skipped = state["step"], state["skipped"]
        for bank in self._banks:
            bank.load_state_dicts(state["layers"])

    def step(self) -> None:
        """Commits a step by hand, right after an optimizer that is no ``torch.optim.Optimizer`` stepped."""
        self._commit()

    def remove(self) -> None:
        """Detaches from the model and the optimizers; biases stay where they are."""
        self._watch.remove()
        detach(self._layers)

    # ---------------------------------------------------------------- backward and the optimizer call these

    def bind(self, scale: Tensor, micro_batch: MicroBatch) -> list[Bound]:
        """The start of a backward: one collective at most, then what each router's backward will read."""
        self._drop_what_failed()
        self._drop_if_gradients_were()
        self._watch.check_no_unseen_step(sum(self._micro_steps))
        self._ranks.check_default()
        part, taken = micro_batch
        banks = self._of(part)
        self._micro_steps[part] += 1
        if self._reduction == "sum" and self._declared[0] is None and banks[0].counted is None:
            raise StateError(
                expected="the step's tokens, because the losses add up (reduction='sum')",
                got="no begin_step",
                do="call balancer.begin_step(tokens=...) before the first micro-batch",
            )
        number, tokens = self._micro_steps[part], self._ranks.tokens
        about = (self._reduction, *self._declared, tokens.size, tokens.rank, self._estimators)
        micro = MicroStep(self._step, number, *about)
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

    def _of(self, part: int) -> list[Bank]:
        return [bank for bank in self._banks if bank.part == part]

    @property
    def _meters(self) -> list[Meter]:
        return [layer.meter for layer in self._layers]

    def _drop_if_gradients_were(self) -> None:
        """A step that was skipped (GradScaler) or zeroed leaves no trace here either."""
        if any(self._micro_steps) and self._watch.gradients_were_dropped():
            declared = self._declared
            self._skipped += not self._watch.inside_closure
            self.discard()
            if self._watch.inside_closure:  # the same step again (LBFGS): what was declared for it still holds
                self._declared = declared

    def _check_begins(self, what: str, *, do: str) -> None:
        self._drop_if_gradients_were()
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
            raise StateError(
                expected="each backward to end",
                got=f"one that stopped on an error in micro-batch {max(self._micro_steps)}, with part of the gradients",
                do="call optimizer.zero_grad() and balancer.discard(), then repeat the step",
            )
        self._skipped += 1
        self.discard()

    def end_backward(self) -> None:
        """Recompute proposed again what was already taken, and the push is done: forget both."""
        self._backward = None
        clear_slots(self._meters)
        for bank in self._banks:
            bank.release()

    def _before_step(self) -> None:
        """Right before the optimizer: all gradients are there, so the sum may travel while the optimizer works."""
        if self._layers:
            check_before_step(self._layers, self._timeline, self._step, self._micro_steps, self._declared[1])
        self._pending = self._ledger.start()

    def _commit(self) -> None:
        """The only place where state changes: one sum over ranks for all layers, then histories, biases, metrics."""
        if self._pending is None:  # a closure optimizer, or step() by hand
            self._before_step()
        assert self._pending is not None
        sums, self._pending = self._pending(), None
        losses = [t.policy for t in self._timeline if isinstance(t.policy, AuxLoss)]
        decays = {loss.decay for loss in losses if loss.estimator == "ema"} | ({0.9} if self._estimators else set())
        sheets = list(zip(self._ledger.sheets, sums, strict=True))
        mine = [(bank, rows_of(summed, rows)) for sheet, summed in sheets for bank, rows in sheet.own]
        if self._estimators:
            known = fidelity_sums(
                self._estimators, [(bank.step_fidelity, bank.counts(summed)) for bank, summed in mine]
            )
            self._fidelity = fidelity(self._estimators, self._ranks.everyone.sum(known))
        with torch.no_grad():
            for bank, summed in mine:
                bank.move_biases(self._timeline, bank.counts(summed), self._step)
                bank.history.commit(bank.counts(summed), decays)
        self._committed = [
            Committed(sheet.plan, sheet.places, summed, [(rows, bank.biases()) for bank, rows in sheet.own])
            for sheet, summed in sheets
        ]
        declared, passes = self._declared[0], max(self._micro_steps) * self._ranks.tokens.size
        self._step += 1
        self.discard()
        for bank, summed in mine:
            check_tokens(bank.plan, summed, declared, passes)

    def _last(self) -> list[Committed]:
        if self._committed is None:
            raise StateError(
                expected="a committed optimizer step", got="none yet", do="call this after optimizer.step()"
            )
        return self._committed
