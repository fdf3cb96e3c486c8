"""Hugging Face: a callback that balances the MoE model of a ``Trainer`` (or TRL's ``SFTTrainer``), all there is to add.

The Trainer counts tokens in labels, multiplies the loss by ranks and divides by micro-batches in one mode and not in
the other; a coefficient added to its loss therefore means something else with every setting (transformers #48690).
Here the balance gradient is coef · E · f / T in all of them, T the router's tokens of the whole step.
"""

from __future__ import annotations

import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..balancer import Balancer
from ..collectives import Ranks
from ..errors import ConfigError, DataError, StateError
from ..layout import router_tokens
from ..policies import AuxLoss, ExpertBias, Policy, Sequences
from ..policies.switch import timeline
from .biases import load_biases, plain_name, put_biases
from .files import FILE, read_state, remove_state, state_file, write_state

__all__ = ["BalanceCallback", "load_biases"]

KEY = "equipoise"  # among the states of callbacks in trainer_state.json
_ACTIVE: weakref.WeakSet[BalanceCallback] = weakref.WeakSet()  # in a training that has not ended


class BalanceCallback(TrainerCallback):
    """``Trainer(..., callbacks=[BalanceCallback([AuxLoss("global_batch", coef=1e-2)])])``.

    Args:
        policies: see ``Balancer``.
        ranks: which ranks see different tokens; default: all.
        options: further keywords of ``Balancer``.

    The balancer lives from the beginning of training to its end; its metrics are in the Trainer's logs, its state in
    each checkpoint (``balancer.equipoise``, where there are biases or loads of the past to keep), from which a resumed
    run goes on; with ``load_best_model_at_end`` the best one's comes back. A run that was not balanced before is from
    the checkpoint on. The balance loss of the model, and the one that TRL adds, are switched off.

    Raises, when training begins, ConfigError for a Trainer that is set up to run a model in a way that was never
    tested here (DataParallel, DeepSpeed, context parallelism), DataError for a checkpoint that lost the balancer's
    state.

    >>> from equipoise import AuxLoss
    >>> BalanceCallback([AuxLoss("global_batch", coef=1e-2)]).balancer is None  # until training begins
    True
    """

    def __init__(self, policies: Sequence[Policy], *, ranks: Ranks | None = None, **options: Any) -> None:
        self.policies, self.ranks, self.options = list(policies), ranks, options
        self.balancer: Balancer | None = None
        self._ranks = Ranks()
        self._trainer: Any = None
        self._trial: Any = None
        self._wrapped: list[str] = []
        self._micro_batches = 1
        self._keeps = False  # whether its state is more than the step
        self._begun_at = 0  # steps of the balancer when this training began

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        trainer, names = _calling(self)
        self._release()
        _end_what_failed(kwargs["model"])
        _check(trainer)
        self._trainer, self._trial = trainer, names.get("trial")
        self._ranks = self.ranks or Ranks.default()
        if getattr(trainer, "aux_loss_enabled", False):  # TRL adds the model's loss itself; the balancer says that it
            trainer.aux_loss_enabled = False  # is switched off, as TRL has set output_router_logits too
        optimizer = _inner(kwargs.get("optimizer"))
        self.balancer = Balancer(kwargs["model"], self.policies, optimizer=optimizer, ranks=self._ranks, **self.options)
        _ACTIVE.add(self)
        for name in ("get_batch_samples", "compute_loss", "log"):
            self._wrap(trainer, name)
        self._warn_of_biases()
        if state.global_step:
            folder = names.get("resume_from_checkpoint") or self._folder(state)
            self._load(Path(folder), state.global_step, state.stateful_callbacks.get(KEY))
        self._keeps = self._remembers()
        state.stateful_callbacks[KEY] = {"args": {}, "attributes": {"file": FILE if self._keeps else ""}}
        self._begun_at = self.balancer.step_count

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """A step that GradScaler skipped: on whole parameters the balancer sees it by itself, on sharded ones here."""
        if self._trainer.is_fsdp_enabled and self._trainer.accelerator.optimizer_step_was_skipped:
            self._balancer().discard()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The model keeps its biases and is balanced by nobody; ``balancer`` still tells of the last step."""
        try:
            if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                best = state.best_global_step
                self._load(Path(state.best_model_checkpoint), best, state.stateful_callbacks.get(KEY))
        finally:
            self._release()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.balancer is not None and args.should_save:
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

    def _release(self) -> None:
        if self._trainer is None:
            return
        for name in self._wrapped:
            delattr(self._trainer, name)
        self._wrapped, self._trainer = [], None
        _ACTIVE.discard(self)
        if self.balancer is not None:
            self.balancer.remove()

    # ---------------------------------------------------------------- what the Trainer calls through us

    def _wrap(self, trainer: Trainer, name: str) -> None:
        """An attribute of this one Trainer hides the method of its class until training ends."""
        mine, theirs = getattr(self, f"_{name}"), getattr(trainer, name)
        setattr(trainer, name, lambda *args, **kwargs: mine(theirs, *args, **kwargs))
        self._wrapped.append(name)

    def _get_batch_samples(self, theirs: Any, *args: Any, **kwargs: Any) -> Any:
        """All micro-batches of the step: the only place where its tokens can be counted before it begins."""
        batches, items = theirs(*args, **kwargs)
        if batches:
            device = next(self._model().parameters()).device
            counts = [torch.as_tensor(_tokens(batch), dtype=torch.float64, device=device) for batch in batches]
            total = float(self._ranks.tokens.sum(torch.stack(counts).sum(dim=0, keepdim=True)))  # waits once a step
            self._micro_batches = len(batches)
            self._warn_of_packing(batches[0])
            self._balancer().begin_step(tokens=total, micro_batches=len(batches))
        return batches, items

    def _compute_loss(self, theirs: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = theirs(model, inputs, *args, **kwargs)
        if not model.training:
            return result
        loss = result[0] if isinstance(result, tuple) else result
        items = args[1] if len(args) > 1 else kwargs.get("num_items_in_batch")  # after return_outputs
        factor = self._micro_batches if self._is_normalised(items) else 1
        # the balancer reckons with losses that are divided by M after the tap; here that is done already, or not at all
        loss = self._balancer().tap(loss * factor) / factor if factor > 1 else self._balancer().tap(loss)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def _log(self, theirs: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        balancer = self._balancer()
        if "loss" in logs and balancer.step_count > self._begun_at:
            logs = logs | balancer.metrics()
        return theirs(logs, *args, **kwargs)

    def _is_normalised(self, items: Any) -> bool:
        """Whether the Trainer will not divide this loss by the number of micro-batches; its own condition."""
        known = getattr(self._trainer, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        return (self._trainer.model_accepts_loss_kwargs and items is not None) or bool(self._trainer.compute_loss_func)

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

    def _remembers(self) -> bool:
        """Whether the next step needs more than the Trainer's own files bring: biases, or loads of the past."""
        losses = [t.policy for t in timeline(self.policies) if isinstance(t.policy, AuxLoss)]
        past = any(loss.scope == "global_batch" and loss.estimator in ("previous", "ema", "filled") for loss in losses)
        return past or any(layer.router.expert_bias is not None for layer in self._balancer()._layers)

    def _load(self, folder: Path, step: int, before: Any) -> None:
        """The state of a checkpoint. ``before``: what its training said that it keeps; None: it was not balanced."""
        balancer = self._balancer()
        if (file := state_file(folder)) is not None:
            state = read_state(file)
            if self._moves_biases:  # first: a LoRA adapter's files do not bring those of its model
                put_biases(balancer, {plain_name(name): bias_E for name, bias_E in state.get("biases", {}).items()})
            balancer.load_state_dict(state)
        elif before is None:
            warnings.warn(
                f"no balancer was in the training that saved {folder}: this one begins there with its own step 0, "
                "without biases and loads of the past",
                stacklevel=3,
            )
        elif before["attributes"]["file"]:
            raise DataError(
                expected=f"the balancer's state in {folder}, whose training kept biases or loads of the past",
                got=f"no {FILE}",
                do="bring the file back, or resume from a checkpoint that has one",
            )
        else:
            balancer.load_state_dict(balancer.state_dict() | {"step": step})

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
        positions = batch.get("position_ids")
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


def _check(trainer: Any) -> None:
    """Ways to run a model in which the gradient was never compared with the law."""
    shards = max(trainer.get_cp_size(), trainer.get_sp_size())
    for found, got, do in (
        (trainer.args.n_gpu > 1, f"DataParallel over {trainer.args.n_gpu}", "start with torchrun or accelerate launch"),
        (trainer.is_deepspeed_enabled, "DeepSpeed", "use FSDP2: fsdp=True, fsdp_config={'version': 2}"),
        (shards > 1, f"sequences cut over {shards} ranks", "use Balancer(ranks=Ranks.of_mesh(...)) in your own loop"),
    ):
        if found:
            raise ConfigError(expected="one process, DDP or FSDP with one device per process", got=got, do=do)
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False) and getattr(collator, "pad_to_multiple_of", None):
        raise ConfigError(
            expected="packed rows without padding",
            got=f"pad_to_multiple_of={collator.pad_to_multiple_of}, and no mask that says what is padding",
            do="leave pad_to_multiple_of out, or padding_free and packing",
        )


def _calls() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Trainers that are running, innermost first, with the local names of each call."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer):
            yield found, frame.f_locals
        frame = frame.f_back


def _calling(callback: BalanceCallback) -> tuple[Any, dict[str, Any]]:
    """The Trainer that calls, and the names of its training loop: callbacks are told of the model only."""
    calls = [(trainer, names) for trainer, names in _calls() if callback in trainer.callback_handler.callbacks]
    if not calls:
        raise StateError(
            expected="a transformers Trainer that begins to train",
            got="a call from elsewhere",
            do="pass BalanceCallback in Trainer(callbacks=[...]); in a loop of your own use Balancer and balancer.tap",
        )
    trainer = calls[0][0]
    return trainer, next((names for t, names in calls if t is trainer and "resume_from_checkpoint" in names), {})


def _end_what_failed(model: nn.Module) -> None:
    """A training of this model that ended in an error said no goodbye; one that still runs keeps its balancer."""
    running = [trainer for trainer, _ in _calls()]
    for other in list(_ACTIVE):
        if other._model() is model and not any(other._trainer is trainer for trainer in running):
            other._release()


def _inner(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer below accelerate's, whose hooks fire once for each step that is made."""
    while optimizer is not None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _tokens(batch: Any) -> Tensor | int:
    """Router tokens of a micro-batch. Raises StateError where they cannot be counted."""
    if (tokens := router_tokens(batch)) is None:
        keys = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(next(iter(batch), None)).__name__
        raise StateError(
            expected="batches with input_ids: the step's tokens are counted before it begins",
            got=f"a {type(batch).__name__} of {keys}",
            do="of a Trainer that makes its tokens itself (GRPO), call balancer.tap in a subclass's compute_loss",
        )
    return tokens
