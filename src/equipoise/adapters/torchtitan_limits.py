"""torchtitan: what of a configuration was never run with equipoise, refused or warned of by its name."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from ..errors import ConfigError
from ..policies import Policy
from ..policies.schedule import Schedule

__all__ = ["check_limits", "check_policies", "own_balancing_off", "warn_of_untried"]

TRIED_DISPATCHERS = ("LocalTokenDispatcher", "AllToAllTokenDispatcher")
TRIED_RECOMPUTE = ("FullAC", "SelectiveAC")
TRIED_COMPILERS = ("aot_eager", "inductor")
QUANTISED = ("float8", "fp8", "mxfp", "nvfp")
OWN_HOOK = "register_moe_load_balancing_hook"


def check_limits(config: Any) -> None:
    """Raises ConfigError for what cannot work, or was never tried and would fail in silence.

    Args:
        config: a ``Trainer.Config``.
    """
    for got, do in _refused(config):
        raise ConfigError(expected="a configuration of torchtitan that equipoise can balance", got=got, do=do)


def warn_of_untried(config: Any, ranks: int) -> None:
    """Names in one warning all that would work, as far as anybody can tell by reading, and that no test has run."""
    if found := list(_never_ran(config, ranks)):
        warnings.warn(
            f"equipoise never ran in torchtitan with {', '.join(found)}: look at its first logs (balance/tokens, "
            "balance/maxvio_global) before you trust it",
            stacklevel=3,
        )


def _refused(config: Any) -> Iterator[tuple[str, str]]:
    parallel, training = config.parallelism, config.training
    if not training.disable_cuda_graphs:
        why = "a graph that is replayed passes the balancer by, which works between forward and backward"
        yield "training.disable_cuda_graphs = False", f"set it to True: {why}"
    if (mode := config.comm.mode) != "default":
        yield f"comm.mode = {mode!r}", "train with mode 'default'"
    if config.debug.moe_force_load_balance:
        yield "debug.moe_force_load_balance = True", "leave it out: the routers then choose nothing"
    for name, degree in {
        "pipeline_parallel_degree": parallel.pipeline_parallel_degree,
        "context_parallel_degree": parallel.context_parallel_degree,
        "tensor_parallel_degree": parallel.tensor_parallel_degree,
    }.items():
        if degree != 1:
            yield f"parallelism.{name} = {degree}", "leave it at 1: no test of equipoise has run it in torchtitan"
    if parallel.spmd_backend == "full_dtensor":
        yield "parallelism.spmd_backend = 'full_dtensor'", "take 'partial_dtensor' or 'spmd_types'"
    if config.debug.spmd_typechecking:
        yield "debug.spmd_typechecking = True", "leave it out: equipoise's tensors carry no types"


def _never_ran(config: Any, ranks: int) -> Iterator[str]:
    for kind in _kinds(config):
        if kind.endswith("Dispatcher") and kind not in TRIED_DISPATCHERS:
            yield f"the dispatcher {kind}"
        if any(word in kind.lower() for word in QUANTISED):
            yield kind
    if config.compile.enable and config.compile.backend not in TRIED_COMPILERS:
        yield f"compile.backend = {config.compile.backend!r}"
    if (backend := config.parallelism.spmd_backend) != "partial_dtensor" and ranks > 1:
        yield f"parallelism.spmd_backend = {backend!r} on several ranks"
    if config.training.enable_cpu_offload:
        yield "training.enable_cpu_offload"
    if config.training.dtype != "float32":
        yield f"training.dtype = {config.training.dtype!r}"
    if config.override.imports:
        yield f"override.imports = {list(config.override.imports)}"
    recompute = config.activation_checkpoint
    if recompute is not None and (name := _owner(recompute)) not in TRIED_RECOMPUTE:
        yield f"activation_checkpoint {name}"


def check_policies(policies: Sequence[Policy], micro_batches: int) -> None:
    """Raises ConfigError for what needs a pass over the step's micro-batches before the step; torchtitan has none."""
    if micro_batches > 1 and any(loss.needs_counting for _, loss in Schedule(policies).losses):
        raise ConfigError(
            expected="policies that need no counting pass, in steps of several micro-batches",
            got=f"scope 'shuffle' or estimator 'exact', and {micro_batches} micro-batches a step",
            do="take estimator 'filled', or a global_batch_size of one micro-batch a rank",
        )


def own_balancing_off(config: Any, policies: Sequence[Policy]) -> str:
    """Takes torchtitan's own updates of its bias out of ``config``; returns what was done, in words.

    Without policies nothing is touched. Raises ConfigError where a function that is not torchtitan's own would run
    after the optimizers are built: it may move the bias too.
    """
    spec = config.model_spec
    coefs = sorted({moe.load_balance_coeff for moe in _moes(config) if moe.load_balance_coeff is not None})
    after = spec.post_optimizer_build_fn
    if not policies:
        moves = bool(coefs) and after is not None
        return f"on, as it was (load_balance_coeff {coefs[0]:g})" if moves else "none"
    if after is None:
        return "none"
    name = getattr(after, "__name__", repr(after))
    if name != OWN_HOOK or not getattr(after, "__module__", "").startswith("torchtitan."):
        raise ConfigError(
            expected=f"torchtitan's own {OWN_HOOK}, which is then left out",
            got=f"ModelSpec.post_optimizer_build_fn = {name}, which may move the routers' bias too",
            do="leave that function out of the model's spec, or train with policies=[], which only looks",
        )
    config.model_spec = replace(spec, post_optimizer_build_fn=None)
    return f"off (its bias was moved with load_balance_coeff {', '.join(f'{c:g}' for c in coefs)})" if coefs else "none"


def _moes(config: Any) -> list[Any]:
    kind = importlib.import_module("torchtitan.models.common.moe").MoE.Config
    return [moe for _, moe, _, _ in config.model_spec.traverse(kind)]


def _kinds(config: Any) -> list[str]:
    """Names of the classes that the model is built of, each once."""
    every = importlib.import_module("torchtitan.config").Configurable.Config
    found = config.model_spec.traverse(every, recurse=True)
    return list(dict.fromkeys(_owner(one) for _, one, _, _ in found))


def _owner(config: Any) -> str:
    return getattr(config._owner, "__name__", type(config).__qualname__)
