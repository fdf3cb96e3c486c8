"""OLMo-core: ``BalanceCallback([...])`` among a trainer's callbacks; its Trainer then balances what it trains."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..balancer.balancer import Balancer
from ..distributed import Group
from ..errors import ConfigError, StateError
from .asked import NO_END, Asked
from .engine import Engine
from .logs import worth_logging
from .olmo_core_limits import check_limits, warn_of_untried
from .olmo_core_routers import (
    Documents,
    balance_router,
    check_bias,
    let_go,
    own_balancing,
    routers_of,
    switch_off,
)
from .plain_state import load_plain_state, plain_state

__all__ = ["BalanceCallback"]

OLMO_CORE = Engine("OLMo-core", "ai2-olmo-core", "3.0.0")
MEASURE_ONLY = 'BalanceCallback([]) measures and changes nothing; BalanceCallback(["global"]) balances'
SHOWN = ("balance/maxvio_global", "balance/maxvio_global_worst", "balance/dead_experts", "balance/*/loss",
         "balance/*/gradient_ratio")  # fmt: skip

Callback: Any = object
if importlib.util.find_spec("olmo_core") is not None:
    Callback = importlib.import_module("olmo_core.train.callbacks").Callback

log = logging.getLogger(__name__)


@dataclass
class BalanceCallback(Callback):
    """A callback of OLMo-core's Trainer that balances the MoE layers of its model.

    Args:
        policies: policies, or what ``policies_from`` takes: names and tables, which a configuration can hold. []
            measures and changes nothing, OLMo-core's own balancing included; with policies its losses at the routers
            and its updates of ``score_bias`` are off, and ``describe()`` says so.
        layers: log the numbers of each layer too.
        strict: a resumed run has to find the state of these policies; False takes what fits, or begins anew.
        on_fault: see ``Balancer``.

    Raises ConfigError without policies and without OLMo-core; in ``post_attach``, when the Trainer is built, for what
    no test of ours has run and for a router that is not OLMo-core's own. ``balancer`` is then the ``Balancer``. Numbers
    go where the trainer's own go, and the state into its checkpoints.

    >>> BalanceCallback()
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected policies of the balance
      got: none
      do:  BalanceCallback([]) measures and changes nothing; BalanceCallback(["global"]) balances
    """

    policies: Any = None
    layers: bool = False
    strict: bool = True
    on_fault: str = "raise"

    def __post_init__(self) -> None:
        self._asked = Asked.read(self.policies, do=MEASURE_ONLY)
        OLMO_CORE.require()
        self.balancer: Balancer | None = None
        self._routers: dict[str, Any] = {}
        self._documents = Documents()
        self._found_state = False
        self._micro_batches = 1
        self._recorded: int | None = None  # steps that the balancer had committed when numbers were last recorded
        self._own = "none"

    # ---------------------------------------------------------------- what the Trainer calls

    def post_attach(self) -> None:
        """The model is built and spread over ranks, its checkpoint not yet loaded."""
        module = self.trainer.train_module
        if getattr(module, "eval_only", False):
            return  # without an optimizer nothing is trained
        check_limits(module)
        self._asked = Asked.read(self.policies, self.trainer.max_steps or NO_END)
        schedule = self._asked.schedule
        self._asked.refuse_counting("OLMo-core's Trainer has no pass before the step")
        self._routers = routers_of(module.model)
        self._own = own_balancing(self._routers, schedule)
        self._documents.wanted = any(loss.scope == "document" for _, loss in schedule.losses)
        try:
            for router in self._routers.values():
                balance_router(router, takes_bias=bool(schedule.biases), documents=self._documents)
            self.balancer = Balancer(module.model, self._asked.policies, module.optim, on_fault=self.on_fault)
        except BaseException:
            let_go(self._routers)
            raise
        if schedule:
            switch_off(self._routers)
        warn_of_untried(module)
        self._train, module.train_batch = module.train_batch, self._train_batch
        self._forward, module.model_forward = module.model_forward, self._model_forward
        for other in self.trainer.callbacks.values():
            if type(other).__name__ == "ConsoleLoggerCallback":
                other.metrics = [*other.metrics, *SHOWN]

    def pre_train(self) -> None:
        """A checkpoint has been loaded, if there is one."""
        if self.balancer is None:
            return
        if self.policies and self.step > 0 and not self._found_state:
            if self.strict:
                raise ConfigError(
                    expected=f"the balancer's state in the checkpoint of step {self.step}",
                    got="none: that run did not balance, or its callback had another name",
                    do="keep the callback's name; BalanceCallback(..., strict=False) begins anew from this step",
                )
            log.warning("equipoise: no balancer's state in the checkpoint of step %d, it begins anew", self.step)
        check_bias(self._routers, self._asked.schedule)
        if Group.world().rank == 0:
            log.info("equipoise in OLMo-core:\n%s", self.describe())

    def post_train_batch(self) -> None:
        """Records the numbers of this step where the trainer is about to collect: reading them waits for a GPU."""
        if self.balancer is None or self.balancer.step_count == self._recorded:
            return
        if self._recorded is None or self.step % self.trainer.metrics_collect_interval == 0:
            self._recorded = self.balancer.step_count
            try:
                numbers = self.balancer.metrics()
            except StateError:
                return  # every step so far was skipped
            for name, number in worth_logging(numbers, layers=self.layers).items():
                self.trainer.record_metric(name, number)

    def state_dict(self) -> dict[str, Any]:
        """The balancer's state; nothing with [], which has none."""
        if self.balancer is None or not self.policies:
            return {}
        return plain_state(self.balancer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Raises ConfigError for the state of another model or of other policies, where ``strict``."""
        if self.balancer is None or not self.policies or not state_dict:
            return
        for line in load_plain_state(self.balancer, state_dict, strict=self.strict):
            log.warning("equipoise: %s", line)
        self._found_state = True

    # ---------------------------------------------------------------- around a step of its train module

    def _train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        assert self.balancer is not None
        rows, length = batch["input_ids"].shape
        self._micro_batches = math.ceil(rows / max(self._at_once // length, 1))  # as split_batch cuts
        if dry_run:
            try:
                self._train(batch, dry_run=True)
            finally:
                self.balancer.discard()
            return
        tokens = rows * length * Group.world().size  # every rank has as many
        self.balancer.begin_step(tokens=tokens, micro_batches=self._micro_batches)
        self._train(batch)

    def _model_forward(self, input_ids: Tensor, labels: Tensor | None = None, **named: Any) -> Any:
        assert self.balancer is not None
        self._documents.read(named.get("doc_lens"), input_ids.shape[1])
        output = self._forward(input_ids, labels=labels, **named)
        if not torch.is_grad_enabled() or not hasattr(output, "loss"):
            return output
        # its loss is the micro-batch's share of the step's already: 1/M of a mean
        return output._replace(loss=self.balancer.tap(output.loss, tokens=1 / self._micro_batches))

    @property
    def _at_once(self) -> int:
        """Tokens of a micro-batch of this rank."""
        return self.trainer.train_module.rank_microbatch_size

    def describe(self) -> str:
        """``Balancer.describe``, what was asked for, what became of OLMo-core's own balancing, Balance BSZ."""
        if self.balancer is None:
            return self._asked.describe("as it is: no Trainer has been built with this, or one that only evaluates")
        whole, ranks = self.trainer.global_batch_size, Group.world().size
        micro = whole // ranks // self._at_once
        sizes = f"micro_batch {self._at_once}, data_parallel {self._at_once * ranks}, global_batch {whole} tokens"
        return (
            f"{self._asked.describe(self._own)}"
            f"Balance BSZ    {sizes} ({ranks} ranks, {micro} micro-batches a step)\n{self.balancer.describe()}"
        )

    def remove(self) -> None:
        """Lets go of the model and the train module. OLMo-core's own balancing stays as it is."""
        if self.balancer is not None:
            self.balancer.remove()
            module = self.trainer.train_module
            module.train_batch, module.model_forward = self._train, self._forward
            let_go(self._routers)
            self.balancer = None
