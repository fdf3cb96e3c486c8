"""DeepSpeed's engine with its own MoE layers: ``DeepSpeedBalancer(engine, [...])`` after ``deepspeed.initialize``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ..balancer.balancer import Balancer
from ..distributed import Group, Ranks
from ..policies.from_data import OnePolicy
from .asked import NO_END, Asked
from .deepspeed_engine import EngineSteps
from .deepspeed_gates import balance_gate, gates_of, let_go
from .logs import worth_logging
from .saved_beside import SavedBeside

__all__ = ["DeepSpeedBalancer"]

LEFT_ON = (  # measured: docs/coefficients.md
    "as it was: l_aux, where your loss adds it; times c it is AuxLoss('micro_batch', coef=c), of a top-2 gate that of "
    "the first choices"
)


class DeepSpeedBalancer(SavedBeside):
    """Balances a model of ``deepspeed.moe.layer.MoE`` as DeepSpeed's engine trains it, ZeRO 0 to 2.

    Args:
        engine: what ``deepspeed.initialize`` returned first. Its ``backward`` and ``step`` pass through here.
        policies: policies, or what ``policies_from`` takes: names and tables. [] measures and changes nothing; with
            policies the layers' own ``l_aux`` is 0, and ``describe()`` says so.
        steps: of the whole run, for policies that change during it.
        sequence_first: the layers get (S, B, D), and not (B, S, D).
        layers: log the numbers of each layer too.
        on_fault: see ``Balancer``.

    Raises ConfigError without policies, for an engine or a gate in a way that no test of ours has run, and for a model
    without such layers. docs/deepspeed.md shows it in a loop.

    The numbers of each step go to the engine's monitor where that is on; ``metrics()`` returns them. ``balancer`` is
    the ``Balancer``.

    >>> DeepSpeedBalancer(None, None)
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected policies of the balance
      got: none
      do:  policies=[] measures and changes nothing; ["global"] balances
    """

    def __init__(
        self,
        engine: Any,
        policies: OnePolicy | Sequence[OnePolicy] | None,
        *,
        steps: int = NO_END,
        sequence_first: bool = False,
        layers: bool = False,
        on_fault: str = "raise",
    ) -> None:
        self._asked = Asked.read(policies, steps)
        self._steps = EngineSteps(engine)
        balances = bool(self._asked.schedule)
        self._asked.refuse_counting("no test has run a counting pass through DeepSpeed's layers")
        self._gates = gates_of(engine.module)
        try:
            for layer in self._gates.values():
                balance_gate(layer, replaces_loss=balances, sequence_first=sequence_first)
            self.balancer = Balancer(
                engine.module,
                self._asked.policies,
                self._steps,
                ranks=Ranks.default(),
                on_fault=on_fault,
            )
        except BaseException:
            let_go(self._gates)
            raise
        self._own = "off: every layer returns l_aux 0" if balances else LEFT_ON
        self._engine, self._layers = engine, layers
        self._theirs: dict[str, Callable[..., Any]] = {"backward": engine.backward, "step": engine.step}
        engine.backward, engine.step = self._backward, self._step

    def _backward(self, loss: Tensor, *args: Any, **named: Any) -> Any:
        return self._theirs["backward"](self.balancer.tap(loss), *args, **named)

    def _step(self, *args: Any, **named: Any) -> Any:
        before = self.balancer.step_count
        outcome = self._steps.around(self._theirs["step"], *args, **named)
        monitor = self._engine.monitor
        if self.balancer.step_count > before and monitor.enabled and Group.world().rank == 0:
            at = self._engine.global_samples
            monitor.write_events([(name, value, at) for name, value in self.metrics().items()])
        return outcome

    def metrics(self) -> dict[str, float]:
        """Of the last step, what is worth a log. Raises StateError before the first."""
        return worth_logging(self.balancer.metrics(), layers=self._layers)

    def describe(self) -> str:
        """``Balancer.describe``, what was asked for, and what became of DeepSpeed's own loss."""
        return self._asked.describe(self._own) + self.balancer.describe()

    def remove(self) -> None:
        """Lets go of the engine and its layers, whose ``l_aux`` is again what it was."""
        self.balancer.remove()
        for name in self._theirs if self._gates else ():
            delattr(self._engine, name)
        let_go(self._gates)
        self._gates = {}  # once: a balancer that was made since keeps its own
