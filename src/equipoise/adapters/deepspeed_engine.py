"""DeepSpeed's engine: when its step was one, and which of its ways to train were run here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ..balancer.balancer import Balancer
from ..balancer.step_detector import ToldSteps
from ..errors import ConfigError
from .engine import Engine

__all__ = ["DEEPSPEED", "EngineSteps", "check_engine"]

DEEPSPEED = Engine("DeepSpeed", "deepspeed", "0.19.8")


class EngineSteps(ToldSteps):
    """The steps of an engine: a call of its ``step`` at the end of an accumulation, unless gradients were infinite.

    ZeRO's optimizers are not torch's, keep gradients in buckets and weights in shards; the engine itself says what
    happened, in every stage.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(f"DeepSpeed's engine (ZeRO {engine.zero_optimization_stage()})")
        check_engine(engine)
        self.engine = engine
        self.balancer: Balancer | None = None

    def around(self, theirs: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Calls ``theirs``, the engine's ``step``."""
        engine = self.engine
        if engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary():
            return theirs(*args, **named)
        self.begins()
        outcome = theirs(*args, **named)
        if engine.was_step_applied():
            self.ended()
        elif self.balancer is not None:
            self.balancer.skip()
        return outcome


def check_engine(engine: Any) -> None:
    """Raises ConfigError for what was never run, or cannot work."""
    for got, do in _refused(engine):
        raise ConfigError(expected="a configuration of DeepSpeed that equipoise was run with", got=got, do=do)


def _refused(engine: Any) -> Iterator[tuple[str, str]]:
    if engine.zenflow:
        yield "zenflow", "leave it out: parts of the weights move at other times than the rest"
