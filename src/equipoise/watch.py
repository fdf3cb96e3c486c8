"""Sees what happens around a balancer: optimizer steps, steps nobody told of, gradients that were thrown away."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from .errors import StateError
from .pressure import Layer

__all__ = ["Watch"]


class Watch:
    """Watches one parameter, the witness: a trainable router's weight, or the model's first trainable parameter.

    Its version counter tells that something stepped between two micro-batches; its ``.grad`` going back to None after
    it was filled tells that gradients were dropped (a skipped GradScaler step, ``zero_grad``). Sharded parameters
    (DTensor) are left alone: FSDP swaps their storage and gradients for its own reasons.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, layers
        self._version: int | None = None
        self._filled = False
        self._hook = None
        self._listeners: list = []
        self._witness: nn.Parameter | None = None
        self._find_witness()

    def listen(
        self, before: Callable[[], None], after: Callable[[], None], optimizer: torch.optim.Optimizer | None
    ) -> None:
        """Calls two methods around each step of ``optimizer``, or of whichever optimizer holds the witness.

        Both are held weakly: these hooks are global and must not keep a model alive.
        """
        checks, commits = weakref.WeakMethod(before), weakref.WeakMethod(after)

        def concerns(stepping: torch.optim.Optimizer) -> bool:
            return stepping is optimizer if optimizer is not None else self.owns(stepping)

        def on_before(stepping: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
            has_closure = bool(args) or kwargs.get("closure") is not None  # then forward and backward are still to come
            if (check := checks()) and not has_closure and concerns(stepping):
                check()

        def on_after(stepping: torch.optim.Optimizer, _args: tuple, _kwargs: dict) -> None:
            if (commit := commits()) and concerns(stepping):
                commit()

        if optimizer is not None:
            self._listeners = [optimizer.register_step_pre_hook(on_before), optimizer.register_step_post_hook(on_after)]
        else:
            self._listeners = [register_optimizer_step_pre_hook(on_before), register_optimizer_step_post_hook(on_after)]
        for listener in self._listeners:
            weakref.finalize(self, listener.remove)

    def _find_witness(self) -> nn.Parameter | None:
        candidates = [p for layer in self._layers for p in layer.router.parameters()] + list(self._model.parameters())
        found = next((p for p in candidates if p.requires_grad), None)
        if found is not self._witness:
            self._unhook()
            self._witness = found
            if found is not None:
                self._hook = found.register_post_accumulate_grad_hook(self._note_gradient)
        return found

    def _note_gradient(self, _parameter: torch.Tensor) -> None:
        self._filled = True

    def owns(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether this optimizer's step is the step: it holds the witness. Others (a second optimizer) do not count."""
        witness = self._find_witness()  # looked up each time: FSDP2 replaces parameters after the balancer was made
        return any(p is witness for group in optimizer.param_groups for p in group["params"])

    def gradients_were_dropped(self) -> bool:
        witness = self._find_witness()
        return self._filled and witness is not None and type(witness) is nn.Parameter and witness.grad is None

    def check_no_unseen_step(self, micro_steps: int) -> None:
        """Raises StateError when the witness changed since the first micro-batch of this step."""
        witness = self._find_witness()
        if witness is None or type(witness) is not nn.Parameter:
            return
        version = witness._version
        if micro_steps == 0 or self._version is None:
            self._version = version
        elif version != self._version:
            raise StateError(
                expected="every optimizer step to reach the balancer",
                got=f"router parameters that changed after micro-batch {micro_steps} without a step that it saw",
                do="pass optimizer= to Balancer; call balancer.step() after an optimizer that is not torch's",
            )

    def step_is_over(self) -> None:
        self._filled, self._version = False, None

    def remove(self) -> None:
        for listener in self._listeners:
            listener.remove()
        self._listeners = []
        self._unhook()

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
