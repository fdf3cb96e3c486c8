"""Sees what happens around a balancer: whose optimizer steps, steps it was not told of, gradients that were thrown away."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from .errors import StateError
from .pressure import Layer

__all__ = ["Watch"]


class Watch:
    """Watches one parameter, the witness: a trainable router's weight, or the model's first trainable parameter.

    Its version counter tells that something stepped between two micro-batches; its ``.grad`` going back to None after it
    was filled tells that gradients were dropped (a skipped GradScaler step, ``zero_grad``). Sharded parameters (DTensor)
    are left alone: FSDP swaps their storage and gradients for its own reasons.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer]) -> None:
        self._model, self._layers = model, layers
        self._version: int | None = None
        self._filled = False
        self._hook = None
        self._witness: nn.Parameter | None = None
        self._find_witness()

    def _find_witness(self) -> nn.Parameter | None:
        candidates = [p for layer in self._layers for p in layer.router.parameters()] + list(self._model.parameters())
        found = next((p for p in candidates if p.requires_grad), None)
        if found is not self._witness:
            self.remove()
            self._witness = found
            if found is not None:
                self._hook = found.register_post_accumulate_grad_hook(self._note_gradient)
        return found

    def _note_gradient(self, parameter: torch.Tensor) -> None:
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
                do="pass optimizer= to Balancer; with an optimizer that is no torch.optim.Optimizer, call balancer.step() after it",
            )

    def step_is_over(self) -> None:
        self._filled, self._version = False, None

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
