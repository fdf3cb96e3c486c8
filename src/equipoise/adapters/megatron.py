"""Megatron-core: ``MegatronBalancer(model, optimizer, [...])`` after both are built, around your ``forward_step``."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..balancer.balancer import Balancer
from ..policies.from_data import OnePolicy
from .asked import NO_END, Asked
from .engine import Engine
from .logs import worth_logging
from .megatron_parallel import (
    check_limits,
    data_ranks,
    is_last_stage,
    ranks_of,
    scale_of,
    stage_file,
    tokens_of,
)
from .megatron_routers import (
    balance_router,
    hidden_carriers,
    in_our_unit,
    let_go,
    own_balancing,
    routers_of,
    switch_off,
)
from .saved_beside import SavedBeside

__all__ = ["MegatronBalancer"]

MEGATRON = Engine("Megatron-core", "megatron-core", "0.16.1")


class MegatronBalancer(SavedBeside):
    """Balances a model of Megatron-core as its own schedule, data parallelism and optimizer train it.

    Args:
        model: the model, or its list of chunks, inside Megatron's DistributedDataParallel.
        optimizer: what ``get_megatron_optimizer`` returned; its ``step`` ends a step.
        policies: policies, or what ``policies_from`` takes: names and tables. [] measures and changes nothing,
            Megatron's own balancing included; with policies its losses and its bias updates are off, and
            ``describe()`` says so.
        steps: of the whole run, for policies that change during it.
        layers: log the numbers of each layer too.
        on_fault: see ``Balancer``.

    Raises ConfigError without policies, for a configuration that no test of ours has run, and for a router that is not
    Megatron's own. docs/megatron.md shows where it goes in a loop.

    ``forward_step`` is wrapped once; the numbers of the step before stand among what the loss function reports, and so
    in Megatron's log. They are read once a step. ``balancer`` is the ``Balancer``.

    >>> MegatronBalancer(nn.Linear(2, 2), None, None)
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected policies of the balance
      got: none
      do:  policies=[] measures and changes nothing; ["global"] balances
    """

    def __init__(
        self,
        model: nn.Module | Sequence[nn.Module],
        optimizer: Any,
        policies: OnePolicy | Sequence[OnePolicy] | None,
        *,
        steps: int = NO_END,
        layers: bool = False,
        on_fault: str = "raise",
    ) -> None:
        self._asked = Asked.read(policies, steps)
        MEGATRON.require()
        self._chunks = [model] if isinstance(model, nn.Module) else list(model)
        schedule = self._asked.schedule
        self._routers = routers_of(self._chunks)
        self.config = importlib.import_module("megatron.core.utils").get_model_config(self._chunks[0])
        check_limits(self.config)
        self._asked.refuse_counting("Megatron's schedule has no pass before the step")
        self._own = own_balancing(self._routers, schedule)
        self._unit = in_our_unit(self._routers, data_ranks())
        inner = [one.optimizer for one in getattr(optimizer, "chained_optimizers", [optimizer])]
        self._ranks = ranks_of(self.config)
        try:
            for router in self._routers.values():
                balance_router(router, takes_bias=bool(schedule.biases))
            self.balancer = Balancer(
                self._chunks,
                self._asked.policies,
                inner[-1],  # of several, the last to step
                ranks=self._ranks,
                on_fault=on_fault,
            )
        except BaseException:
            let_go(self._routers)
            raise
        if schedule:
            switch_off(self._routers)
        self._layers = layers
        self._reported: dict[str, Tensor] | None = {}  # of the last step; None: to be read when they are asked for
        self._optimizer, self._step = optimizer, optimizer.step
        optimizer.step = self._stepped
        self._finalized = self.config.finalize_model_grads_func
        self.config.finalize_model_grads_func = None if self._finalized is None else self._finalize

    def forward_step(self, forward_step: Callable[..., Any]) -> Callable[..., Any]:
        """Your forward step, its loss function tapped: what ``get_forward_backward_func()`` gets."""

        @functools.wraps(forward_step)
        def balanced(*args: Any, **named: Any) -> Any:
            if self._finalized is None and self.config.finalize_model_grads_func not in (None, self._finalize):
                self._finalized = self.config.finalize_model_grads_func  # set after this was made
                self.config.finalize_model_grads_func = self._finalize
            output, loss_function, *rest = forward_step(*args, **named)
            if not is_last_stage():
                return (self.balancer.tap(output, scale=lambda: scale_of(self.config)), loss_function, *rest)
            return (output, self._tapped(loss_function), *rest)

        return balanced

    def _tapped(self, loss_function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loss_function)
        def tapped(*args: Any, **named: Any) -> Any:
            outputs = loss_function(*args, **named)
            if named.get("non_loss_data") or not torch.is_grad_enabled():
                return outputs
            loss, *tokens, report = outputs
            loss = self.balancer.tap(loss, tokens=tokens_of(self.config, tokens[0] if tokens else None))
            return (loss, *tokens, {**report, **self._report(loss)})

        return tapped

    def _report(self, loss: Tensor) -> dict[str, Tensor]:
        """Of the step before: the numbers of this one are known when all its micro-batches are."""
        if self._reported is None:
            numbers = worth_logging(self.balancer.metrics(), layers=self._layers)
            self._reported = {name: torch.tensor([value], device=loss.device) for name, value in numbers.items()}
        return self._reported

    def _stepped(self, *args: Any, **named: Any) -> Any:
        outcome = self._step(*args, **named)
        if isinstance(outcome, tuple) and outcome and outcome[0] is False:
            self.balancer.skip()  # infinite gradients: Megatron left the weights as they were
        else:
            self._reported = None
        return outcome

    def _finalize(self, *args: Any, **named: Any) -> Any:
        assert self._finalized is not None
        with hidden_carriers(self._routers):
            return self._finalized(*args, **named)

    def describe(self) -> str:
        """``Balancer.describe``, what was asked for, what became of Megatron's own balancing."""
        unit = f"in our unit    {self._unit}\n" if self._unit else ""
        return f"{self._asked.describe(self._own)}{unit}{self.balancer.describe()}"

    def _state_file(self) -> tuple[str, bool]:
        return stage_file(self.config), self._ranks.data.rank == 0

    def remove(self) -> None:
        """Lets go of the model and the optimizer. Megatron's own balancing stays as it is."""
        self.balancer.remove()
        if self._routers:
            self._optimizer.step = self._step
            self.config.finalize_model_grads_func = self._finalized
        let_go(self._routers)
        self._routers = {}  # once: a balancer that was made since keeps its own
