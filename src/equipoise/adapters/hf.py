"""Hugging Face: a callback that balances the MoE model of a ``Trainer`` (or TRL's ``SFTTrainer``), all there is to add.

The Trainer counts tokens in labels, multiplies the loss by ranks and divides by micro-batches in one mode and not in
the other; a coefficient added to its loss therefore means something else with every setting (transformers #48690).
Here the balance gradient is coef · E · f / T in all of them, T the router's tokens of the whole step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from ..balancer import Balancer
from ..collectives import Ranks
from ..errors import DataError, StateError
from ..policies import Policy

__all__ = ["BalanceCallback"]

FILE = "balancer.safetensors"


class BalanceCallback(TrainerCallback):
    """``Trainer(..., callbacks=[BalanceCallback([AuxLoss("global_batch", coef=1e-2)])])``.

    Args:
        policies: see ``Balancer``.
        ranks: which ranks see different tokens; default: all.
        options: further keywords of ``Balancer``.

    The balancer lives from the beginning of training to its end; its metrics are in the Trainer's logs, its state in
    each checkpoint (``balancer.safetensors``), from which a resumed run goes on. The model's own balance loss is
    switched off.

    >>> from equipoise import AuxLoss
    >>> BalanceCallback([AuxLoss("global_batch", coef=1e-2)]).balancer is None  # until training begins
    True
    """

    def __init__(self, policies: Sequence[Policy], *, ranks: Ranks | None = None, **options: Any) -> None:
        self.policies, self.ranks, self.options = list(policies), ranks, options
        self.balancer: Balancer | None = None
        self._ranks = Ranks()
        self._trainer: Trainer | None = None
        self._wrapped: list[str] = []
        self._micro_batches = 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        trainer, model = _trainer_of(self), kwargs["model"]
        self._release()  # a training that ended in an error said no goodbye
        if args.n_gpu > 1:
            raise StateError(
                expected="one device per process",
                got=f"DataParallel over {args.n_gpu}",
                do="start with torchrun or accelerate launch",
            )
        self._trainer = trainer
        self._ranks = self.ranks or Ranks.default()
        optimizer = _inner(kwargs.get("optimizer"))
        self.balancer = Balancer(model, self.policies, optimizer=optimizer, ranks=self._ranks, **self.options)
        for name in ("get_batch_samples", "compute_loss", "log"):
            self._wrap(trainer, name)
        if state.global_step:
            self._load(Path(_folder(args, state)))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The model keeps its biases and is balanced by nobody; ``balancer`` still tells of the last step."""
        self._release()

    def _release(self) -> None:
        for name in self._wrapped:
            delattr(self._trainer, name)
        self._wrapped = []
        if self.balancer is not None:
            self.balancer.remove()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        if self.balancer is not None and state.is_world_process_zero:
            _save(self.balancer.state_dict(), Path(_folder(args, state)) / FILE)

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
            tokens = torch.tensor([sum(_tokens(batch) for batch in batches)], dtype=torch.float64)
            device = next(self._model().parameters()).device
            total = float(self._ranks.tokens.sum(tokens.to(device)))
            self._micro_batches = len(batches)
            self._balancer().begin_step(tokens=total, micro_batches=len(batches))
        return batches, items

    def _compute_loss(self, theirs: Any, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        result = theirs(model, inputs, *args, **kwargs)
        if not model.training:
            return result
        loss = result[0] if isinstance(result, tuple) else result
        factor = self._micro_batches if self._is_normalised(kwargs.get("num_items_in_batch")) else 1
        # the balancer reckons with losses that are divided by M after the tap; here that is done already, or not at all
        loss = self._balancer().tap(loss * factor) / factor if factor > 1 else self._balancer().tap(loss)
        return (loss, *result[1:]) if isinstance(result, tuple) else loss

    def _log(self, theirs: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
        balancer = self._balancer()
        if "loss" in logs and balancer.step_count:
            logs = logs | balancer.metrics()
        return theirs(logs, *args, **kwargs)

    def _is_normalised(self, items: Any) -> bool:
        """Whether the Trainer will not divide this loss by the number of micro-batches; its own condition."""
        trainer: Any = self._trainer
        known = getattr(trainer, "loss_is_scaled_for_ga", None)
        if known is not None:
            return known
        return (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None

    def _balancer(self) -> Balancer:
        assert self.balancer is not None
        return self.balancer

    def _model(self) -> nn.Module:
        model = getattr(self._trainer, "model", None)
        assert isinstance(model, nn.Module)
        return model

    def _load(self, folder: Path) -> None:
        if not (folder / FILE).exists():
            raise DataError(
                expected=f"the balancer's state in {folder}",
                got="none",
                do="resume from a checkpoint that was saved with BalanceCallback, or begin anew",
            )
        self._balancer().load_state_dict(_read(folder / FILE))


def _trainer_of(callback: BalanceCallback) -> Trainer:
    """The Trainer that calls: callbacks are told of its model and optimizer, and not of itself."""
    frame = sys._getframe(1)
    while frame is not None:
        found = frame.f_locals.get("self")
        if isinstance(found, Trainer) and callback in found.callback_handler.callbacks:
            return found
        frame = frame.f_back
    raise StateError(
        expected="a transformers Trainer that begins to train",
        got="a call from elsewhere",
        do="pass BalanceCallback in Trainer(callbacks=[...]); in a loop of your own use Balancer and balancer.tap",
    )


def _inner(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer below accelerate's, whose hooks fire once for each step that is made."""
    while optimizer is not None and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _tokens(batch: Any) -> int:
    """Router tokens of a micro-batch: those that are not padding."""
    mask = batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return int((mask != 0).sum())
    ids = next(batch[key] for key in ("input_ids", "inputs_embeds") if batch.get(key) is not None)
    return ids.shape[0] * ids.shape[1]


def _folder(args: Any, state: Any) -> str:
    return f"{args.output_dir}/checkpoint-{state.global_step}"


def _save(state: dict[str, Any], path: Path) -> None:
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"$tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {key: take(inner) for key, inner in value.items()}
        return [take(inner) for inner in value] if isinstance(value, list | tuple) else value

    text = json.dumps(take(state))
    save_file(tensors, path, metadata={"state": text})


def _read(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
        text = file.metadata()["state"]

    def put(value: Any) -> Any:
        if isinstance(value, dict):
            return tensors[value["$tensor"]] if "$tensor" in value else {key: put(v) for key, v in value.items()}
        return [put(inner) for inner in value] if isinstance(value, list) else value

    return put(json.loads(text))
