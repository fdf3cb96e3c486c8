"""DeepSpeed's engine: when its step was one, and which of its ways to train were run here."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..balancer.told_steps import ToldSteps
from ..errors import ConfigError
from .engine import Engine

__all__ = ["DEEPSPEED", "EngineSteps", "check_engine"]

DEEPSPEED = Engine("DeepSpeed", "deepspeed", "0.19.8")
AUTO_EP = "deepspeed.module_inject.auto_ep"


class EngineSteps(ToldSteps):
    """The steps of an engine: a call of its ``step`` at the end of an accumulation, unless gradients were infinite.

    ZeRO's optimizers are not torch's, keep gradients in buckets and weights in shards; the engine itself says what
    happened, in every stage.

    Raises ConfigError for an engine in a way that was never run, or cannot work.
    """

    def __init__(self, engine: Any) -> None:
        DEEPSPEED.require()
        check_engine(engine)
        super().__init__(f"DeepSpeed's engine (ZeRO {engine.zero_optimization_stage()})")
        self.engine = engine

    def around(self, theirs: Callable[..., Any], *args: Any, **named: Any) -> Any:
        """Calls ``theirs``, the engine's ``step``."""
        engine = self.engine
        if engine.managed_gradient_accumulation() and not engine.is_gradient_accumulation_boundary():
            return theirs(*args, **named)
        self.begins()
        outcome = theirs(*args, **named)
        if engine.was_step_applied():
            self.ended()
        else:
            self.skipped()
        return outcome


def check_engine(engine: Any) -> None:
    """Raises ConfigError for what was never run, or cannot work, and for what is no engine."""
    if not hasattr(engine, "is_gradient_accumulation_boundary"):
        raise ConfigError(
            expected="the engine of DeepSpeed",
            got=f"a {type(engine).__name__}",
            do="pass what deepspeed.initialize returned first",
        )
    for got, do in _refused(engine):
        raise ConfigError(expected="a configuration of DeepSpeed that equipoise was run with", got=got, do=do)
    _warn_of_offload(engine)


def _refused(engine: Any) -> Iterator[tuple[str, str]]:
    zero, untried = engine._config.zero_config, "leave it out: no test has run it"
    if type(engine).__name__ == "PipelineEngine":
        yield "a PipelineEngine", "train with data or expert parallelism: no test has run pipelines"
    if (ranks := engine.sequence_parallel_size) > 1:
        yield f"sequences cut over {ranks} ranks (Ulysses)", untried
    if (ranks := engine.autotp_size()) > 1:
        yield f"tensor parallelism of {ranks} (AutoTP)", untried
    if engine.zenflow:
        yield "zenflow", "leave it out: parts of the weights move at other times than the rest"
    if engine.is_deepcompile_enabled():
        yield "compile: {deepcompile: true}", untried
    if getattr(engine, "torch_autocast_z0_gradscaler", None) is not None:
        yield (
            "torch_autocast in fp16 with ZeRO 0, whose skipped steps the engine reports as taken",
            "train with ZeRO 1, 2 or 3, or in bf16",
        )
    if engine.random_ltd_enabled():
        yield "random_ltd", "leave it out: it drops tokens on their way through the model"
    for name in ("zero_quantized_weights", "zero_quantized_gradients"):
        if getattr(zero, name, False):
            yield f"{name}: true", untried
    for name in ("zero_hpz_partition_size", "mics_shard_size"):
        if (ranks := getattr(zero, name, 1)) > 1:
            yield f"{name}: {ranks}", untried
    auto = [one for one in engine.module.modules() if type(one).__module__.startswith(AUTO_EP)]
    if auto:
        yield (
            f"AutoEP ({type(auto[0]).__name__} in place of the model's own MoE layers)",
            untried,
        )


def _warn_of_offload(engine: Any) -> None:
    """Of weights or optimizer states that DeepSpeed keeps on CPUs or disks: it changes no gradient, but never ran."""
    zero = engine._config.zero_config
    away = [name for name in ("offload_optimizer", "offload_param") if getattr(zero, name) is not None]
    if away:
        warnings.warn(
            f"{' and '.join(away)} of DeepSpeed: no test of equipoise has run it; look at the first logs "
            "(balance/tokens, balance/maxvio_global) before you trust it",
            stacklevel=2,
        )
