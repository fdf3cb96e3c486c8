"""The balancer: prepares each backward for a model's routers and commits once per optimizer step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..autograd.finite import in_shape_inference
from ..autograd.protocol import BalancedRouter
from ..autograd.token_layout import TokenLayout
from ..distributed import Ranks
from ..errors import ConfigError, StateError
from ..external.batch_context import declared_layout
from ..policies.from_data import OnePolicy, policies_from
from ..policies.schedule import Schedule
from .attach import attach, detach, is_attached, parts_of, undo
from .counting import counting_pass, keep_counted, take_counted
from .declared_step import DeclaredStep
from .describe import describe
from .evaluation import evaluating
from .faults import Faults, no_counting, no_forward
from .metrics import StepStats, metrics
from .state import VERSION, keeping_biases, load_states, put_biases, states_of
from .step import StepCycle
from .step_detector import Steps
from .tap import TappedForward, check_loss, tap_loss
from .told_steps import ToldSteps, optimizer_with_hooks

__all__ = ["Balancer"]


class Balancer(StepCycle):
    """Keeps the experts of a model evenly loaded. One object, one line per step: ``loss = balancer.tap(loss)``.

    Args:
        model: any module with ``equipoise.layers.Router`` inside, or a MoE model of transformers; a list of the parts
            that this rank holds of one (interleaved and zero-bubble pipelines).
        policies: what pushes; their gradients add up: policies, or names and tables as ``policies_from`` takes them.
            With none, ``[]``, all is measured and nothing changed: gradients, outputs, the model's own balance loss.
        optimizer: whose step ends a step. Default: the torch optimizer that holds the routers' parameters.
        ranks: which ranks see different tokens, and hold other layers (see ``equipoise.distributed``). Default: all
            ranks of ``torch.distributed`` hold the same layers and see other sequences. All ranks make their balancer
            together, and tap equally often in a step.
        reduction: how the engine's losses of a step combine: "mean" (each is a mean; the engine averages them over
            micro-batches and ranks) or "sum" (they add up to the step's loss; needs ``begin_step(tokens=)``).
        sequences_per_micro_batch: for a loop that runs several micro-batches as one pass, which is often faster: scope
            "micro_batch" is then every so many sequences of a pass, as if each had run alone.
        example: arguments of forward, to find another library's routers with; models of transformers bring their own,
            also inside a wrapper.
        part: the name of what to balance inside ``model``, where a wrapper holds other MoE models too: "llm".
        measure_estimators: compare prefix, previous, ema and filled with the exact f; see ``estimator_error()``.
        gradient_norms: measure each policy's gradient against the language model's at the routers.
        on_fault: what a guard does that finds a bad step (NaN logits, a push that never arrived, ...): "raise" on all
            ranks, or "warn": leave the step unbalanced, count it (``balance/faulty_steps``) and go on.

    While it is attached, ``own_loss`` (see `equipoise.external.own_loss`) holds what policies replace of the model's
    own balance loss; ``remove()`` puts that back.

    Raises:
        ConfigError: no router, an unknown name, or a bias rule known to fail with the router's gate.
        StateError: the model already has a balancer; later, calls in an order that would train something else.

    What counts as a step, which tokens are divided by, and how they lie is in docs/what-counts.md; ``describe()`` says
    what was found and assumed.

    >>> from equipoise import AuxLoss, Balancer, MoE
    >>> model = MoE(dim=8, hidden=16, num_experts=4, top_k=2)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> balancer = Balancer(model, [AuxLoss("global_batch", coef=1e-2)], optimizer)
    >>> loss = balancer.tap(model(torch.randn(2, 6, 8)).square().mean())  # the identity; learns the scale of the loss
    >>> loss.backward()
    >>> optimizer.step()
    >>> balancer.metrics()["balance/tokens"]
    12.0
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        policies: OnePolicy | Sequence[OnePolicy],
        optimizer: torch.optim.Optimizer | ToldSteps | None = None,
        *,
        ranks: Ranks | None = None,
        reduction: str = "mean",
        sequences_per_micro_batch: int | None = None,
        example: Mapping[str, Any] | None = None,
        part: str | None = None,
        measure_estimators: bool = False,
        gradient_norms: bool = True,
        on_fault: str = "raise",
    ) -> None:
        if reduction not in ("mean", "sum"):
            raise ConfigError(expected="reduction: 'mean' or 'sum'", got=repr(reduction), do="'mean' in most loops")
        self.policies = policies_from(policies)
        schedule, parts = Schedule(self.policies), parts_of(model, part)
        ranks, ends_steps = ranks or Ranks.default(), optimizer_with_hooks(optimizer)
        self._example = example
        faults = Faults(on_fault, ranks.all)
        layers, self.own_loss = attach(
            parts,
            schedule,
            measure_estimators=measure_estimators,
            gradient_norms=gradient_norms,
            micro_sequences=sequences_per_micro_batch,
            shards=ranks.sequence_shards.size,
            may_be_empty=ranks.all.size > ranks.data.size,
            example=example,
        )
        estimators = ("prefix", "previous", "ema", "filled") if measure_estimators else ()
        try:
            super().__init__(parts, layers, schedule, ranks, faults, reduction=reduction, estimators=estimators)
        except BaseException:
            undo(layers, self.own_loss)
            raise
        of_step = (self._before_step, self._commit, self._step_inside_backward, self.skip)
        self._detector.listen(Steps(*of_step), ends_steps)
        for layer in layers:
            layer.balance_state.owner = self  # a balancer lives as long as its model, also when nobody else keeps it
            layer.balance_state.raises_immediately = faults.raises_immediately

    # ---------------------------------------------------------------- a training step, in order

    def begin_step(
        self, *, tokens: float | Mapping[str, float] | None = None, micro_batches: int | None = None
    ) -> None:
        """Declares the valid router tokens of the coming step, over all ranks and micro-batches, for uneven batches.

        Without it every micro-batch weighs the same, which is exact when all have equally many tokens. With
        reduction "mean", ``micro_batches`` (per rank) is needed too, and checked at the step. Where routers see
        different numbers (multi-token prediction, encoder and decoder) say each by its name or the beginning of it:
        ``tokens={"trunk": 4096, "mtp": 4080}``.
        """
        self._check_begins("begin_step", do="call it right after optimizer.step(); after a skipped step skip()")
        self._declared = DeclaredStep.of(tokens, micro_batches, self._sums.names, self._reduction)

    @property
    def needs_counting(self) -> bool:
        """Whether a step of several micro-batches needs a counting pass: estimator "exact", scope "shuffle"."""
        return any(loss.needs_counting for loss in self._schedule.losses_at(self._step))

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Around one forward of every micro-batch of the step, before the step: no gradient, random numbers replayed.

        The model stays in training mode, so that dropout draws what it will draw again.
        """
        self._check_begins("the counting pass", do="count first, then train")
        try:
            with counting_pass(self._groups, pools=self._schedule.shuffles):
                yield
        except BaseException:
            self.discard()
            raise
        taken = take_counted(self._groups)
        self._note_missing_forward(self._groups, taken, no_counting())
        keep_counted(self._groups, taken, self._sums, self._ranks.data)

    def tap(
        self,
        loss: Tensor,
        *,
        scale: float | Callable[[], Tensor | float] | None = None,
        tokens: Tensor | float | None = None,
    ) -> Tensor:
        """Returns ``loss`` unchanged. Its backward, which runs before every router's, binds the policies to the step.

        Args:
            loss: the scalar that the engine scales and calls backward on: the tap learns 1/M and GradScaler's scale
                from the gradient that arrives, so tap first and scale then: ``(tap(loss) / M).backward()``.
                Without gradient, in evaluation, or after ``remove()``, nothing happens.
            scale: for a pipeline stage without the loss: tap its output activations with the scale said explicitly, or
                with a function that knows it when that backward begins.
            tokens: where ``loss`` is a sum over so many tokens that the engine divides later (Megatron's
                (sum, number of tokens)): the scale is then that of their mean. 0, where no token has a label, counts
                as 1, as engines divide: its routers have tokens all the same.
        """
        if not isinstance(loss, Tensor):
            check_loss(loss, scale)
        if not is_attached(self._layers):
            return loss
        if not (torch.is_grad_enabled() and loss.requires_grad):
            self._clear_pending(first=2)  # and not a training forward whose loss is still to be tapped
            return loss
        part = self._forwards.last_part
        groups = self._groups_of(part)
        if not any(layer.router.training for group in groups for layer in group.layers):
            self._evaluated = bool(groups) and not self._evaluating
            return loss
        check_loss(loss, scale)
        taken = self._passes[part].take(loss)
        if in_shape_inference():  # what it measured is taken, and forgotten
            return loss
        if not any(self._micro_steps):
            self._check_routers()
        self._detector.tapped(max(self._micro_steps), self._dropped)
        silent = no_forward("none since the last tap that this loss is made of")
        self._note_missing_forward(groups, [one.statistics_LS for one in taken], silent)
        return tap_loss(loss, self, TappedForward(part, taken), scale, tokens)

    @contextmanager
    def evaluation(self) -> Iterator[dict[str, float]]:
        """Around forwards of the model in ``eval()`` mode, without gradient: counts what its routers see there.

        Yields a dict that is filled when the context is left, with the names of `metrics` (loads alone: nothing is
        pushed). Padding is left out, and all ranks are summed: they enter together, and one without batches takes part
        all the same. Nothing of it reaches the step under way; outside of it evaluation counts nothing.

        Where sequences are cut over ranks, what is measured inside a sequence or micro-batch is left out. Raises
        StateError inside another evaluation, and where no router ran.

        >>> from equipoise import Balancer, MoE
        >>> model = MoE(dim=8, hidden=16, num_experts=4, top_k=2).eval()
        >>> with Balancer(model, []).evaluation() as found:
        ...     _ = model(torch.randn(2, 6, 8))
        >>> found["balance/tokens"]
        12.0
        """
        if self._evaluating or not is_attached(self._layers):
            raise StateError(
                expected="one evaluation at a time, of a model that is balanced",
                got="an evaluation inside another" if self._evaluating else "one after remove()",
                do="leave the first before the next" if self._evaluating else "evaluate before you call remove()",
            )
        self._evaluating = True
        try:
            with evaluating(self._groups, self._sums, self._device) as found:
                yield found
        finally:
            self._evaluating = False

    def discard(self) -> None:
        """Forgets the micro-batches since the last step: after out-of-memory, or with ``zero_grad`` without a step."""
        self._forget()
        self._faults.noted = None
        self._untapped = 0

    def layout(self, lies: TokenLayout) -> AbstractContextManager[None]:
        """Around forwards of another library's model: how their tokens lie, over what its arguments tell.

        For masks that say who sees whom, documents and classes that nothing else tells. Holds for routers whose tokens
        are as many: ``with balancer.layout(TokenLayout(B, token_mask_T)): loss = model(...).loss``.
        """
        return declared_layout([one for layer in self._layers if (one := layer.router.batch_context) is not None], lies)

    def skip(self) -> None:
        """Says that the optimizer skips this step (a spike, an overflow): forgotten like `discard`, and counted.

        For optimizers that skip where nobody can see it; a step that GradScaler skips, or that leaves whole fp32
        parameters as they were, is noticed.
        """
        self._skipped += 1
        self.discard()

    # ---------------------------------------------------------------- what it learnt

    @property
    def schedule(self) -> Schedule:
        """The policies with the steps at which they act, and the names of their metrics."""
        return self._schedule

    @property
    def routers(self) -> dict[str, BalancedRouter]:
        """The balanced routers by name, in the model's order."""
        return {layer.name: layer.router for layer in self._layers}

    @property
    def step_count(self) -> int:
        """Optimizer steps committed so far."""
        return self._step

    def metrics(self, layers: bool = True) -> dict[str, float]:
        """The last committed step as flat names: loss and gradient_ratio per policy, MaxVio per scope, ...

        ``balance/global/loss`` (``global`` is the policy's name) is 1 in balance; ``.../gradient_ratio`` is the norm of
        the policy's gradient at the router logits over that of the language-model loss;
        ``balance/maxvio_micro_batch`` and ``_sequence`` are means.
        ``layers=False`` leaves out the numbers of each layer, ``balance/layer_03/...``, and keeps their means.
        """
        found = metrics(self._last(), self._schedule, self._step - 1, layers=layers)
        left = {"skipped_steps": self._skipped, "faulty_steps": self._faults.steps}
        return found | {f"balance/{key}": float(number) for key, number in left.items()}

    def load(self) -> list[Tensor]:
        """Counts of the last committed global batch, one (E,) int64 tensor a layer."""
        rows = [(place, row) for one in self._last() for place, row in zip(one.places, one.counts.long(), strict=True)]
        return [counts_E for _, counts_E in sorted(rows, key=lambda row: row[0])]

    def estimator_error(self) -> dict[str, dict[str, float]] | None:
        """Of the last step: each estimator's gradient against exact (relative_error, cosine); None if not measured."""
        return self._estimator_error

    def describe(self) -> str:
        """What was found and assumed, to be read: routers, biases, layouts, tokens, what ends a step, ranks, sizes."""
        return describe(
            self._layers,
            self._schedule,
            self._ranks,
            switched_off=self.own_loss.words,
            ends_with=self._detector.ends_with,
            declared=self._declared,
            reduction=self._reduction,
            raises=self._faults.raises,
            last=self._committed or (),
            step=self._step - 1,
            attached=is_attached(self._layers),
        )

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs: the step, previous and ema loads, momentum, drift; and the biases it belongs to.

        Micro-batches since the last step are left out, as their gradients are from every checkpoint.
        """
        states = states_of(self._groups, self._schedule)
        layers = {layer.name: states[layer.name] for layer in self._layers}
        return {"version": VERSION, "step": self._step, "skipped": self._skipped, "layers": layers}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> list[str]:
        """Takes a saved state; biases that the model's weights did not bring are put back.

        Returns, a line each, what did not fit, where ``strict`` is False. Raises ConfigError, with nothing changed,
        for the state of another model: other routers, sizes, policies with memory, or biases.
        """
        version = state.get("version") if isinstance(state, Mapping) else None
        if version != VERSION:
            raise ConfigError(
                expected=f"a balancer's state of version {VERSION}",
                got=f"version {version}",
                do="load a state that this version saved; biases alone are in the model's own weights",
            )
        unfit = load_states(self._groups, state["layers"], self._schedule, strict=strict)
        self.discard()
        self._faults.forget()
        self._unmoved = None
        self._step, self._skipped = state["step"], state["skipped"]
        return unfit

    def copy_biases(self, to: nn.Module) -> None:
        """Writes the expert biases into another copy of the model: an average of its weights, a teacher.

        An average of parameters has no bias, or one of another moment, and without it other experts answer. Call it
        after each update of a hand-written average, or before the average is evaluated or saved; ``AveragedModel`` of
        ``torch.optim.swa_utils`` keeps biases by itself when it is made after the balancer. Every copied router gets a
        bias, also where it had none.

        Raises ConfigError where ``to`` has other routers.

        >>> import copy
        >>> from equipoise import Balancer, ExpertBias, MoE
        >>> model = MoE(dim=8, hidden=16, num_experts=4, top_k=2, gate="sigmoid")
        >>> average = copy.deepcopy(model)  # made before the balancer: it has no bias
        >>> balancer = Balancer(model, [ExpertBias()])
        >>> _ = model.gate.expert_bias.copy_(torch.arange(4.0))
        >>> balancer.copy_biases(average)
        >>> average.gate.expert_bias
        tensor([0., 1., 2., 3.])
        """
        if not (policies := keeping_biases(self._layers)):
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            other = Balancer(to, policies, ranks=Ranks(), example=self._example)
        try:
            put_biases(other._layers, {layer.name: layer.biases for layer in self._layers})
        finally:
            other.remove()

    def step(self) -> None:
        """Commits a step by hand, right after an optimizer that is no ``torch.optim.Optimizer`` stepped."""
        self._detector.ends_with = "balancer.step()"
        self._commit()

    def remove(self) -> None:
        """Detaches from the model and the optimizers, and puts the model's own balance loss back as it was.

        Biases stay where they are, and the model goes on choosing with them.
        """
        if (fault := self._faults.late()) is not None:
            warnings.warn(fault, stacklevel=2)
        self._detector.remove()
        self._forwards.remove()
        detach(self._layers, self.own_loss)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A module that holds its balancer can be copied and saved: the copy has None, as its routers have none."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        warnings.warn("a Balancer is saved as None: keep balancer.state_dict() beside the model", stacklevel=2)
        return type(None), ()

    def _last(self) -> list[StepStats]:
        if self._committed is None:
            raise StateError(expected="a committed optimizer step", got="none yet", do="call it after optimizer.step()")
        return self._committed
