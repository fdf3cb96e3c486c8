"""Hugging Face: a callback that balances the MoE model of a ``Trainer`` (or TRL's ``SFTTrainer``), all there is to add.

The Trainer counts tokens in labels, multiplies the loss by ranks and divides by micro-batches in one mode and not in
the other; a coefficient added to its loss therefore means something else with every setting (transformers #48690).
Here the balance gradient is coef · E · f / T in all of them, T the router's tokens of the whole step.
"""

from __future__ import annotations

import textwrap
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ..balancer import Balancer
from ..collectives import Ranks
from ..errors import ConfigError, DataError, EquipoiseError, StateError
from ..policies import ExpertBias, Policy, Sequences
from ..policies.switch import timeline
from .files import FILE, read_state, write_state
from .logs import worth_logging
from .tokens import StepTokens
from .trainers import Hooked, calling, calls, changes_batches, check, in_words_of_trainer, inner

__all__ = ["BalanceCallback", "load_biases"]

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
    each checkpoint (``balancer.safetensors``), from which a resumed run goes on; with ``load_best_model_at_end`` the
    best one's comes back. The balance loss of the model, and the one that TRL adds, are switched off meanwhile.

    Raises, when training begins, ConfigError for a Trainer that is set up to run a model in a way that was never
    tested here (DataParallel, DeepSpeed, context parallelism), DataError for a checkpoint without the balancer's state.

    >>> from equipoise import AuxLoss
    >>> BalanceCallback([AuxLoss("global_batch", coef=1e-2)]).balancer is None  # until training begins
    True
    """

    def __init__(
        self,
        policies: Sequence[Policy],
        *,
        tokens: str | Callable[[Any], Tensor | int] | None = None,
        strict: bool = True,
        layers: bool = False,
        ranks: Ranks | None = None,
        **options: Any,
    ) -> None:
        self.policies, self.ranks, self.options = list(policies), ranks, options
        self.tokens, self.strict, self.layers = tokens, strict, layers
        self.balancer: Balancer | None = None
        self._ranks = Ranks()
        self._tokens = StepTokens(tokens, "", self._ranks)  # raises for a word that it does not know
        self._trainer: Any = None
        self._trial: Any = None
        self._hooked = Hooked()
        self._aux_loss_enabled = self._warned = False
        self._first: Any = None  # batch of the step that has not begun
        self._total: float | None = None  # tokens of that step
        self._micro_batches = 1
        self._begun_at = 0  # steps of the balancer when this training began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        trainer, names = calling(self)
        self._release()
        _end_what_failed(kwargs["model"])
        check(trainer)
        self._trainer, self._trial = trainer, names.get("trial")
        self._ranks = self.ranks or Ranks.default()
        self._tokens = StepTokens(self.tokens, changes_batches(trainer), self._ranks)
        self._warned = False
        self._aux_loss_enabled = bool(self.policies) and getattr(trainer, "aux_loss_enabled", False)
        if self._aux_loss_enabled:  # TRL adds the model's loss itself; the balancer says that it
            trainer.aux_loss_enabled = False  # is switched off, as TRL has set output_router_logits too
        optimizer = inner(kwargs.get("optimizer"))
        self.balancer = Balancer(kwargs["model"], self.policies, optimizer=optimizer, ranks=self._ranks, **self.options)
        self.balancer._faults.translate = in_words_of_trainer
        _ACTIVE.add(self)
        self._hooked.hook(trainer.accelerator, "backward", self._backward)
        self._hooked.hook(trainer, "get_batch_samples", self._get_batch_samples)
        self._hooked.hook(trainer, "evaluation_loop", self._evaluation_loop)
        self._hooked.hook(trainer, "log", self._log)
        self._hooked.hook(trainer, "_save", self._save)
        self._warn_of_biases()
        self._warn_of_weights()
        if state.global_step and self.policies:
            self._resume(Path(names.get("resume_from_checkpoint") or self._folder(state)))
        self._begun_at = self.balancer.step_count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """A step that GradScaler skipped: on whole parameters the balancer sees it by itself, on sharded ones here."""
        if self._trainer.is_fsdp_enabled and self._trainer.accelerator.optimizer_step_was_skipped:
            self._balancer().discard()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The model keeps its biases and is balanced by nobody; ``balancer`` still tells of the last step."""
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None and self.policies:
                self._load(Path(state.best_model_checkpoint))
        finally:
            self._release()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.policies and self.balancer is not None and args.should_save:
            self.save(self._folder(state))

    def save(self, folder: str | Path) -> None:
        """Writes ``balancer.safetensors`` into an existing folder; ``load_biases`` reads it.

        Raises StateError before a training, OutputError where the file cannot be written.
        """
        if self.balancer is None:
            raise StateError(expected="a balancer", got="none before training begins", do="train first")
        layers = self.balancer._layers if self._moves_biases else []
        biases = {_plain_name(layer.name): layer.router.expert_bias for layer in layers}
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
        self._trainer = self._first = None
        _ACTIVE.discard(self)
        if self.balancer is not None:
            self.balancer.remove()

    # ---------------------------------------------------------------- what the Trainer calls through us

    def _get_batch_samples(self, theirs: Any, *args: Any, **kwargs: Any) -> Any:
        """All micro-batches of the step, before it begins."""
        batches, items = theirs(*args, **kwargs)
        if batches:
            self._micro_batches, self._first = len(batches), batches[0]
            self._total = self._tokens.of_step(batches, next(self._model().parameters()).device)
            self._warn_of_packing(batches[0])
            self._warn_of_weights()
        return batches, items

    def _backward(self, theirs: Any, loss: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The loss as it counts in the step: whatever divided it, it is 1/M of the mean over M micro-batches."""
        balancer = self._balancer()
        if self._first is not None:  # the batch's forward is over: what the routers saw is known
            self._tokens.look(self._first, balancer._meters)
            self._warn_of_weights()
            total, self._first = None if self._tokens.left_open else self._total, None
            balancer.begin_step(tokens=total, micro_batches=self._micro_batches)
        try:
            return theirs(balancer.tap(loss, tokens=1 / self._micro_batches), *args, **kwargs)
        except EquipoiseError as error:
            raise in_words_of_trainer(error) from None

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
        return any(isinstance(t.policy, ExpertBias) for t in timeline(self.policies))

    def _balancer(self) -> Balancer:
        assert self.balancer is not None
        return self.balancer

    def _model(self) -> nn.Module:
        return self._trainer.model

    def _folder(self, state: Any) -> Path:
        return Path(self._trainer._get_output_dir(self._trial)) / f"checkpoint-{state.global_step}"

    def _resume(self, folder: Path) -> None:
        """Raises DataError, ConfigError where the checkpoint's state is not of these policies."""
        if not (folder / FILE).is_file():
            if self.strict:
                raise DataError(
                    expected=f"the balancer's state in {folder}",
                    got=f"no {FILE}: this run was not balanced, or not by BalanceCallback",
                    do="BalanceCallback(..., strict=False) begins balancing in the middle of a run",
                )
            warnings.warn(
                f"no {FILE} in {folder}: balancing begins here, its steps count from 0 (strict=False)", stacklevel=3
            )
            return
        try:
            unfit = self._load(folder, strict=self.strict)
        except ConfigError as error:
            do = "resume with the model and policies of the checkpoint; after a change on purpose "
            do += "BalanceCallback(..., strict=False) takes what fits and warns of what it left out"
            raise ConfigError(expected=error.expected, got=error.got, do=do) from None
        if unfit:
            warnings.warn(f"not restored from {folder / FILE} (strict=False): {'; '.join(unfit)}", stacklevel=3)

    def _load(self, folder: Path, *, strict: bool = True) -> list[str]:
        state = read_state(folder / FILE)
        if self._moves_biases:  # first: a LoRA adapter's files do not bring those of its model
            _put_biases(self._balancer(), state.get("biases", {}))
        return self._balancer().load_state_dict(state, strict=strict)

    def _warn_of_weights(self) -> None:
        """Once, where each micro-batch weighs the same, nobody asked for it, and there are several."""
        several = self._trainer.args.gradient_accumulation_steps > 1 or self._ranks.tokens.size > 1
        if self._tokens.left_open and several and not self._warned and self._trainer.is_world_process_zero():
            self._warned = True
            warnings.warn(
                f"{self._tokens.describe()}; BalanceCallback(..., tokens=...) takes 'counted', 'micro_batch', or a "
                "function that counts a batch",
                stacklevel=4,
            )

    def _warn_of_biases(self) -> None:
        """Of biases that move and are in no file that ``save_model`` writes."""
        routers = [layer.router for layer in self._balancer()._layers if layer.trainable and self._moves_biases]
        adapter = hasattr(self._model(), "peft_config")  # of which PEFT saves no buffer but those of modules_to_save
        buffers = self._model().named_buffers()
        saved = {b.data_ptr() for name, b in buffers if not adapter or "modules_to_save" in name}
        lost = any(router.expert_bias.data_ptr() not in saved for router in routers)
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
        scopes = [getattr(t.policy, "scope", None) for t in timeline(self.policies)]
        if int((positions == 0).sum()) > len(positions) and any(
            s == "sequence" or isinstance(s, Sequences) for s in scopes
        ):
            warnings.warn(
                "rows are packed: scope 'sequence' takes all documents of a row for one sequence; "
                "AuxLoss('document', ...) balances each for itself",
                stacklevel=3,
            )


def load_biases(model: nn.Module, folder: str | Path) -> None:
    """Puts expert biases back that a model's own files do not hold: of LoRA adapters, and of families without one.

    Args:
        model: the model whose training wrote ``folder``, with its weights loaded; an adapter may be merged.
        folder: with ``balancer.safetensors``: a checkpoint, or where ``BalanceCallback.save`` wrote it.

    A model without a bias of its own chooses with it from now on, by hooks on its routers. Raises DataError for a file
    that cannot be read or is of another model.

    >>> load_biases(torch.nn.Linear(1, 1), "nowhere")
    Traceback (most recent call last):
    equipoise.errors.DataError: expected the balancer's state in nowhere
      got: no balancer.safetensors
      do:  pass a checkpoint that was saved with BalanceCallback
    """
    biases = read_state(Path(folder) / FILE).get("biases", {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="every router of this model is frozen")
        balancer = Balancer(model, [ExpertBias(rate=0.0)])
    try:
        known = {_plain_name(layer.name) for layer in balancer._layers}
        if not biases or not biases.keys() <= known:
            raise DataError(
                expected=f"expert biases of {', '.join(sorted(known))}",
                got=", ".join(biases) or "none",
                do="load them into the model that they were trained with",
            )
        _put_biases(balancer, biases)
    finally:
        balancer.remove()


def _put_biases(balancer: Balancer, biases: dict[str, Tensor]) -> None:
    """Into the model's routers, by name."""
    with torch.no_grad():
        for layer in balancer._layers:
            if (bias_E := biases.get(_plain_name(layer.name))) is not None:
                layer.router.expert_bias.copy_(bias_E)


def _plain_name(name: str) -> str:
    """A router's name in the model below PEFT's wrappers."""
    for part in (".base_layer", ".modules_to_save.default"):
        name = name.removesuffix(part)
    return name.removeprefix("base_model.model.")


def _end_what_failed(model: nn.Module) -> None:
    """A training of this model that ended in an error said no goodbye; one that still runs keeps its balancer."""
    running = [trainer for trainer, _ in calls()]
    for other in list(_ACTIVE):
        if other._model() is model and not any(other._trainer is trainer for trainer in running):
            other._release()
