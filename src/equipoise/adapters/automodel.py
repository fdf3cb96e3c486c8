"""NeMo Automodel: ``AutomodelBalancer(model, [...])`` for a parallelised model, and two calls in the training loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..balancer.balancer import Balancer
from ..distributed import Ranks
from ..errors import ConfigError, InputError
from ..external.padding import router_tokens
from ..policies.from_data import OnePolicy
from .asked import NO_END, Asked
from .automodel_gates import balance_gate, layers_of, let_go, own_balancing, switch_off, warn_of_untried
from .engine import Engine
from .logs import worth_logging
from .plain_state import load_plain_state, plain_state

__all__ = ["AutomodelBalancer"]

AUTOMODEL = Engine("NeMo Automodel", "nemo_automodel", "0.7.0")


class AutomodelBalancer:
    """Balances a MoE model of NeMo Automodel in a training loop that weighs tokens as its recipes do.

    Args:
        model: the model, or its list of one part, after ``fully_shard`` and after its weights were loaded.
        policies: policies, or what ``policies_from`` takes: names and tables. [] measures and changes nothing,
            Automodel's own balancing included; with policies its loss and its updates of the bias are off, and
            ``describe()`` says so.
        steps: of the whole run, for policies that change during it.
        layers: ``metrics()`` has the numbers of each layer too.
        on_fault: see ``Balancer``.

    Raises ConfigError without policies, for what no test of ours has run, and for a gate that is not Automodel's own.

    The loss of a micro-batch is a sum over its labels divided by all labels of the step, as the recipes' is:
    ``begin_step(batches)`` before the step's forwards, ``loss = balance.tap(loss)`` before ``(loss * dp).backward()``.
    The step of the optimizer that holds the gates ends it. ``balancer`` is the ``Balancer``.

    >>> AutomodelBalancer(nn.Linear(2, 2), None)
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected policies of the balance
      got: none
      do:  policies=[] measures and changes nothing; ["global"] balances
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        policies: OnePolicy | Sequence[OnePolicy] | None,
        *,
        steps: int = NO_END,
        layers: bool = False,
        on_fault: str = "raise",
    ) -> None:
        self._asked = Asked.read(policies, steps)
        AUTOMODEL.require()
        schedule = self._asked.schedule
        parts = [model] if isinstance(model, nn.Module) else list(model)
        if len(parts) != 1:
            raise ConfigError(
                expected="a model in one part",
                got=f"{len(parts)} parts",
                do="train without pipeline parallelism: no test of equipoise has run it in Automodel",
            )
        found = layers_of(parts[0])
        self._gates = {name: layer.gate for name, layer in found.items()}
        self._own = own_balancing(self._gates, schedule)
        self._ranks, self._layers = Ranks.default(), layers
        try:
            for layer in found.values():
                balance_gate(layer, takes_bias=bool(schedule.biases))
            self.balancer = Balancer(
                parts[0],
                self._asked.policies,
                ranks=self._ranks,
                reduction="sum",  # each loss is divided by the labels of all ranks and micro-batches
                on_fault=on_fault,
            )
        except BaseException:
            let_go(self._gates)
            raise
        if schedule:
            switch_off(self._gates)
        warn_of_untried(self._gates)

    def begin_step(self, batches: Sequence[Mapping[str, Any]] = (), *, tokens: float | None = None) -> None:
        """Says what a step is divided by: the tokens of its micro-batches that are no padding, of all ranks.

        Args:
            batches: this rank's, all of the step.
            tokens: of all ranks, where the batches do not tell.

        Waits for all ranks, and for the device, once. Raises InputError for batches that do not tell.
        """
        if tokens is None:
            counts = [_tokens_of(batch) for batch in batches]
            if not counts or None in counts:
                raise InputError(
                    expected="all batches of the step, with input_ids or a mask",
                    got=f"{len(counts)} batches" if None not in counts else f"one of {', '.join(batches[0])}",
                    do="begin_step(batches), or begin_step(tokens=number of router tokens of all ranks)",
                )
            device = self.balancer._device
            total = torch.stack([torch.as_tensor(count, dtype=torch.float64, device=device) for count in counts]).sum()
            tokens = float(self._ranks.data.sum(total.view(1)))
        self.balancer.begin_step(tokens=tokens)

    def tap(self, loss: Tensor) -> Tensor:
        """``loss``, unchanged. Multiply it by the size of the data-parallel group afterwards, as the recipes do."""
        return self.balancer.tap(loss)

    def metrics(self) -> dict[str, float]:
        """What is worth logging of the last step; see ``Balancer.metrics``."""
        return worth_logging(self.balancer.metrics(), layers=self._layers)

    def describe(self) -> str:
        """``Balancer.describe``, what was asked for, and what became of Automodel's own balancing."""
        return self._asked.describe(self._own) + self.balancer.describe()

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs; all ranks have the same. The biases are in the model's own state."""
        return plain_state(self.balancer)

    def load_state_dict(self, state_dict: dict[str, Any], strict: bool = True) -> list[str]:
        """Goes on from ``state_dict()``, whatever is recomputed now; see ``Balancer.load_state_dict``."""
        return load_plain_state(self.balancer, state_dict, strict=strict)

    def remove(self) -> None:
        """Lets go of the model. Automodel's own balancing stays as it is."""
        self.balancer.remove()
        let_go(self._gates)
        self._gates = {}  # once: a balancer that was made since keeps its own


def _tokens_of(batch: Mapping[str, Any]) -> Tensor | int | None:
    padding = batch.get("padding_mask")  # True where there is no token, as its MoE layers take it
    return (~padding).sum() if isinstance(padding, Tensor) else router_tokens(batch)
