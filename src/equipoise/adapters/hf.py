"""Hugging Face: a callback that balances the MoE model of a ``Trainer`` (or TRL's ``SFTTrainer``), all there is to add.

The Trainer counts tokens in labels, multiplies the loss by ranks and divides by micro-batches in one mode and not in
the other; a coefficient added to its loss therefore means something else with every setting (transformers #48690).
Here the balance gradient is coef · E · f / T in all of them, T the router's tokens of the whole step.
"""

from __future__ import annotations

import textwrap
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from ..balancer.balancer import Balancer
from ..distributed import Ranks
from ..errors import ConfigError, DataError, EquipoiseError, StateError
from ..policies import Sequences
from ..policies.from_data import OnePolicy, policies_from
from ..policies.schedule import Schedule
from ..storage.balancer_file import FILE, read_state, remove_state, state_file, write_state
from .biases import load_biases, plain_name, put_biases, saved_place
from .deepspeed_engine import EngineSteps
from .logs import worth_logging
from .tokens import StepTokens
from .trainers import (
    ENDS_TRAINING,
    SAVES,
    Hooked,
    calling,
    calls,
    changes_batches,
    check,
    in_words_of_trainer,
    noting_how_it_begins,
    what_steps,
)

__all__ = ["BalanceCallback", "load_biases"]

KEY = "equipoise"  # among the states of callbacks in trainer_state.json
_ACTIVE: weakref.WeakSet[BalanceCallback] = weakref.WeakSet()  # in a training that has not ended


class BalanceCallback(TrainerCallback):
    """``Trainer(..., callbacks=[BalanceCallback([AuxLoss("global_batch", coef=1e-2)])])``.

    Args:
        policies: see ``Balancer``; ``[]`` only measures, and leaves the model's own balance loss as it is.
        tokens: what each step is divided by. "counted": the tokens of its batches, so that each weighs the same;
            "micro_batch": not known before, so that each micro-batch weighs the same; a function that returns how
            many tokens of a batch the routers will see. Default: counted where the batch is what the model gets, else
            "micro_batch", with a warning where that makes a difference (see docs/fine-tuning.md).
        strict: in a resumed run, whether the checkpoint has to hold the balancer's state of these policies. False:
            takes what fits, begins the rest anew, and warns of it.
        layers: whether logs have the numbers of each layer too, and not only those of the whole model.
        ranks: which ranks see different tokens; default: all.
        options: further keywords of ``Balancer``.

    The balancer lives from the beginning of training to its end; its metrics are in the Trainer's logs, its state in
    each checkpoint (``balancer.equipoise``, where there are biases or loads of the past to keep), from which a resumed
    run goes on; with ``load_best_model_at_end`` the best one's comes back. A run that was not balanced before is from
    the checkpoint on. The balance loss of the model, and the one that TRL adds, are switched off meanwhile.

    Raises, when training begins, ConfigError for a Trainer that is set up to run a model in a way that was never
    tested here (DataParallel, context parallelism), DataError for a checkpoint that lost the balancer's
    state.

    >>> from equipoise import AuxLoss
    >>> BalanceCallback([AuxLoss("global_batch", coef=1e-2)]).balancer is None  # until training begins
    True
    """

    def __init__(
        self,
        policies: OnePolicy | Sequence[OnePolicy],
        *,
        tokens: str | Callable[[Any], Tensor | int] | None = None,
        strict: bool = True,
        layers: bool = False,
        ranks: Ranks | None = None,
        **options: Any,
    ) -> None:
        self.policies, self.ranks, self.options = policies_from(policies), ranks, options
        self.tokens, self.strict, self.layers = tokens, strict, layers
        self.balancer: Balancer | None = None
        self._ranks = Ranks()
        self._tokens = StepTokens(tokens, "", self._ranks)  # raises for a word that it does not know
        self._trainer: Any = None
        self._trial: Any = None
        self._attached_to: Any = None
        self._beginning: tuple[Any, dict[str, Any]] | None = None  # of the training that begins
        self._hooked = Hooked()
        self._aux_loss_enabled = self._warned = False
        self._waiting: tuple[float | None, int] | None = None  # the first step of all, not begun until it is looked at
        self._micro_batches = 1
        self._keeps = False  # whether its state is more than the step
        self._begun_at = 0  # steps of the balancer when this training began

    def attach(self, trainer: Any) -> BalanceCallback:
        """Balances every training of this Trainer, or of one of TRL's; returns the callback.

        The same as passing the callback in ``callbacks=``, without the walk up the stack by which a callback finds its
        Trainer there.

        Raises StateError where it belongs to another Trainer.
        """
        if self._attached_to not in (None, trainer):
            raise StateError(
                expected="one Trainer for each BalanceCallback",
                got="one that is attached to another Trainer",
                do="make a callback for each: BalanceCallback(policies).attach(trainer)",
            )
        if self._attached_to is None:
            self._attached_to = trainer
            noting_how_it_begins(trainer, self._note_beginning)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self

    def _note_beginning(self, trainer: Any, trial: Any, folder: Any) -> None:
        self._release()  # a training that ended in an error
        self._beginning = (trainer, {"trial": trial, "resume_from_checkpoint": folder})

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        with self._released_on_error():
            self._begin(state, **kwargs)

    def _begin(self, state: Any, **kwargs: Any) -> None:
        trainer, names = calling(self) if self._beginning is None else self._beginning
        self._release()
        if self._beginning is None:
            _end_what_failed(kwargs["model"])
        check(trainer, self.policies)
        self._trainer, self._trial = trainer, names.get("trial")
        self._warned, self._ranks = False, self.ranks or Ranks.default()
        self._tokens = StepTokens(self.tokens, changes_batches(trainer), self._ranks)
        self._aux_loss_enabled = bool(self.policies) and getattr(trainer, "aux_loss_enabled", False)
        if self._aux_loss_enabled:  # TRL adds the model's loss itself; the balancer says that it
            trainer.aux_loss_enabled = False  # is switched off, as TRL has set output_router_logits too
        steps = what_steps(trainer, kwargs.get("optimizer"))
        self.balancer = Balancer(kwargs["model"], self.policies, optimizer=steps, ranks=self._ranks, **self.options)
        if isinstance(steps, EngineSteps):
            self._hooked.hook(steps.engine, "step", steps.around)
        self.balancer._faults.translate = in_words_of_trainer
        _ACTIVE.add(self)
        self._hooked.hook(trainer.accelerator, "backward", self._backward)
        self._hooked.hook(trainer, "get_batch_samples", self._get_batch_samples)
        self._hooked.hook(trainer, "evaluation_loop", self._evaluation_loop)
        self._hooked.hook(trainer, "log", self._log)
        self._hooked.hook(trainer, SAVES, self._save)
        for name in ENDS_TRAINING:
            if hasattr(trainer, name):
                self._hooked.hook(trainer, name, self._to_its_end)
        self._warn_of_biases()
        self._warn_of_weights()
        if state.global_step and self.policies:
            folder = names.get("resume_from_checkpoint") or self._folder(state)
            self._load(Path(folder), state.global_step, state.stateful_callbacks.get(KEY), strict=self.strict)
        self._keeps = self._remembers()
        if self.policies:
            state.stateful_callbacks[KEY] = {"args": {}, "attributes": {"file": FILE if self._keeps else ""}}
        self._begun_at = self.balancer.step_count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """A step that GradScaler skipped: on whole parameters the balancer sees it by itself, on sharded ones here."""
        if self._trainer.is_fsdp_enabled and self._trainer.accelerator.optimizer_step_was_skipped:
            self._balancer().discard()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The model keeps its biases and is balanced by nobody; ``balancer`` still tells of the last step."""
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None and self.policies:
                best = state.best_global_step
                self._load(Path(state.best_model_checkpoint), best, state.stateful_callbacks.get(KEY))
        finally:
            self._release()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.policies and self.balancer is not None and args.should_save:
            folder, own = self._folder(state), self.balancer.state_dict()
            remove_state(folder)
            if self._keeps or (own["step"], own["skipped"]) != (state.global_step, 0):
                self.save(folder)

    def save(self, folder: str | Path) -> None:
        """Writes ``balancer.equipoise`` into an existing folder; ``load_biases`` reads it.

        Raises StateError before a training, OutputError where the file cannot be written.
        """
        if self.balancer is None:
            raise StateError(expected="a balancer", got="none before training begins", do="train first")
        layers = self.balancer._layers if self._moves_biases else []
        biases = {plain_name(layer.name): layer.router.expert_bias for layer in layers}
        write_state(self.balancer.state_dict() | {"biases": biases}, Path(folder) / FILE)

    def describe(self) -> str:
        """What was found and assumed: how this Trainer's tokens are weighed, and ``Balancer.describe``.

        Raises StateError before a training.
        """
        if self.balancer is None:
            raise StateError(expected="a balancer", got="none before training begins", do="train first")
        law = textwrap.fill(f"weights       {self._tokens.describe()}", 80, subsequent_indent=" " * 14)
        return f"{law}\n{self.balancer.describe()}"

    def _release(self) -> None:
        if self._trainer is None:
            return
        self._hooked.release()
        if self._aux_loss_enabled:
            self._trainer.aux_loss_enabled = True
        self._trainer = self._waiting = None
        _ACTIVE.discard(self)
        if self.balancer is not None:
            self.balancer.remove()

    @contextmanager
    def _released_on_error(self) -> Iterator[None]:
        """A training that ends in an error gives the model back as one that ends well does."""
        try:
            yield
        except BaseException:
            if self.balancer is not None:
                self.balancer._faults.forget()  # not to be read now: the device may be what failed
            self._release()
            raise

    # ---------------------------------------------------------------- what the Trainer calls through us

    def _get_batch_samples(self, theirs: Any, *args: Any, **kwargs: Any) -> Any:
        """All micro-batches of the step, before it begins."""
        batches, items = theirs(*args, **kwargs)
        if batches:
            self._micro_batches = len(batches)
            total = self._tokens.of_step(batches, next(self._model().parameters()).device)
            self._warn_of_packing(batches[0])
            self._warn_of_weights()
            self._waiting = (total, len(batches)) if self._tokens.looks else None
            if self._waiting is None:
                self._balancer().begin_step(tokens=total, micro_batches=len(batches))
        return batches, items

    def _backward(self, theirs: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The loss as it counts in the step: whatever divided it, it is 1/M of the mean over M micro-batches."""
        balancer = self._balancer()
        if self._waiting is not None:  # its first forward is over: what the routers saw of it is known
            (total, micro_batches), self._waiting = self._waiting, None
            self._tokens.look([layer.balance_state for layer in balancer._layers])
            self._warn_of_weights()
            balancer.begin_step(tokens=None if self._tokens.left_open else total, micro_batches=micro_batches)
        try:
            return theirs(balancer.tap(loss, tokens=1 / self._micro_batches), *args, **kwargs)
        except EquipoiseError as error:
            raise in_words_of_trainer(error) from None

    def _to_its_end(self, theirs: Any, *args: Any, **kwargs: Any) -> Any:
        with self._released_on_error():
            return theirs(*args, **kwargs)

    def _log(self, theirs: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        balancer = self._balancer()
        if "loss" in logs and balancer.step_count > self._begun_at:
            logs = logs | worth_logging(balancer.metrics(), layers=self.layers)
        return theirs(logs, *args, **kwargs)

    def _evaluation_loop(self, theirs: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Loads of the evaluation are among its metrics, so they are logged and returned with them."""
        output = None
        try:
            with self._balancer().evaluation() as found:
                output = theirs(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        except StateError:
            if output is None:  # it is not ours
                raise
            warnings.warn(f"no {metric_key_prefix}_balance/...: no router ran in evaluation mode", stacklevel=2)
            return output
        numbers = worth_logging(found, layers=self.layers)
        output.metrics.update({f"{metric_key_prefix}_{name}": number for name, number in numbers.items()})
        return output

    def _save(self, theirs: Any, *args: Any, **kwargs: Any) -> Any:
        """What a checkpoint says of the model's own loss is what the user said."""
        with self._balancer().own_loss.as_it_was():
            return theirs(*args, **kwargs)

    # ---------------------------------------------------------------- small parts

    @property
    def _moves_biases(self) -> bool:
        return bool(Schedule(self.policies).biases)

    def _balancer(self) -> Balancer:
        assert self.balancer is not None
        return self.balancer

    def _model(self) -> nn.Module:
        return self._trainer.model

    def _folder(self, state: Any) -> Path:
        return Path(self._trainer._get_output_dir(self._trial)) / f"checkpoint-{state.global_step}"

    def _remembers(self) -> bool:
        """Whether the next step needs more than the Trainer's own files bring: biases, coefficients, past loads."""
        plan, layers = Schedule(self.policies), self._balancer()._layers
        past = any(loss.estimates and loss.estimator in ("previous", "ema", "filled") for _, loss in plan.losses)
        return past or bool(plan.self_setting) or any(layer.biases for layer in layers)

    def _load(self, folder: Path, step: int, before: Any, *, strict: bool = True) -> None:
        """The state of a checkpoint. ``before``: what its training said that it keeps; None: it was not balanced."""
        balancer = self._balancer()
        if (file := state_file(folder)) is not None:
            self._load_file(file, strict=strict)
        elif before is None or (before["attributes"]["file"] and not strict):
            why = "was in the training that saved" if before is None else "is in"
            warnings.warn(
                f"no balancer {why} {folder}: this one begins there with its own step 0, without biases and loads of "
                "the past",
                stacklevel=3,
            )
        elif before["attributes"]["file"]:
            raise DataError(
                expected=f"the balancer's state in {folder}, whose training kept biases or loads of the past",
                got=f"no {FILE}",
                do="bring the file back, or resume from a checkpoint that has one; BalanceCallback(..., strict=False) "
                "begins there without it",
            )
        else:
            balancer.load_state_dict(balancer.state_dict() | {"step": step})

    def _load_file(self, file: Path, *, strict: bool) -> None:
        """Raises ConfigError where it is of other policies, or of another model, and ``strict`` is set."""
        balancer, state = self._balancer(), read_state(file)
        if self._moves_biases and saved_place(state) == balancer.schedule.bias_place:
            # first: a LoRA adapter's files do not bring those of its model
            put_biases(balancer, {plain_name(name): bias_E for name, bias_E in state.get("biases", {}).items()})
        try:
            unfit = balancer.load_state_dict(state, strict=strict)
        except ConfigError as error:
            do = "resume with the model and policies of the checkpoint; after a change on purpose "
            do += "BalanceCallback(..., strict=False) takes what fits and warns of what it left out"
            raise ConfigError(expected=error.expected, got=error.got, do=do) from None
        if unfit:
            warnings.warn(f"not restored from {file} (strict=False): {'; '.join(unfit)}", stacklevel=4)

    def _warn_of_weights(self) -> None:
        """Once, where each micro-batch weighs the same, nobody asked for it, and there are several."""
        several = self._trainer.args.gradient_accumulation_steps > 1 or self._ranks.data.size > 1
        if self._tokens.left_open and several and not self._warned and self._trainer.is_world_process_zero():
            self._warned = True
            warnings.warn(
                f"{self._tokens.describe()}; BalanceCallback(..., tokens=...) takes 'counted', 'micro_batch', or a "
                "function that counts a batch",
                stacklevel=4,
            )

    def _warn_of_biases(self) -> None:
        """Of biases that move and are in no file that ``save_model`` writes."""
        layers = [layer for layer in self._balancer()._layers if layer.trainable and self._moves_biases]
        adapter = hasattr(self._model(), "peft_config")  # of which PEFT saves no buffer but those of modules_to_save
        buffers = self._model().named_buffers()
        saved = {b.data_ptr() for name, b in buffers if not adapter or "modules_to_save" in name}
        lost = any(bias_E.data_ptr() not in saved for layer in layers for bias_E in layer.biases.values())
        if lost and self._trainer.is_world_process_zero():
            warnings.warn(
                f"ExpertBias moves biases that the files of {'a LoRA adapter' if adapter else 'this model'} do not "
                f"hold. Each checkpoint has them in {FILE} (BalanceCallback.save writes it elsewhere); put them back "
                "with equipoise.adapters.hf.load_biases(model, folder)",
                stacklevel=3,
            )

    def _warn_of_packing(self, batch: Any) -> None:
        """B58: a row of documents that follow each other without padding is no sequence."""
        positions = batch.get("position_ids") if isinstance(batch, Mapping) else None
        if not isinstance(positions, Tensor) or positions.dim() != 2 or self._balancer().step_count > self._begun_at:
            return
        scopes = [loss.scope for _, loss in Schedule(self.policies).losses]
        if int((positions == 0).sum()) > len(positions) and any(
            s == "sequence" or isinstance(s, Sequences) for s in scopes
        ):
            warnings.warn(
                "rows are packed: scope 'sequence' takes all documents of a row for one sequence; "
                "AuxLoss('document', ...) balances each for itself",
                stacklevel=3,
            )


def _end_what_failed(model: nn.Module) -> None:
    """A training of this model that ended in an error said no goodbye; one that still runs keeps its balancer."""
    running = [trainer for trainer, _ in calls()]
    for other in list(_ACTIVE):
        if other._model() is model and not any(other._trainer is trainer for trainer in running):
            other._release()
