"""OLMo-core: what of a training was never run with equipoise, refused or warned of by its name."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

from ..distributed import Group
from ..errors import ConfigError

__all__ = ["check_limits", "warn_of_untried"]

TOUCHED = ("train_batch", "model_forward", "optim_step")  # of the train module: where a step passes
NO_TEST = "no test of equipoise has run it in OLMo-core"


def check_limits(module: Any) -> None:
    """Raises ConfigError for what cannot work, or was never tried and would fail in silence.

    Args:
        module: the train module of a Trainer.
    """
    theirs = importlib.import_module("olmo_core.train.train_module").TransformerTrainModule
    other = [one for one in TOUCHED if getattr(type(module), one, None) is not getattr(theirs, one)]
    if other:
        raise ConfigError(
            expected="OLMo-core's own TransformerTrainModule",
            got=f"a {type(module).__module__}.{type(module).__qualname__} with its own {other[0]}()",
            do="train with TransformerTrainModuleConfig; for a module of your own write what BalanceCallback does",
        )
    for got, do in _refused(module):
        raise ConfigError(expected="a training of OLMo-core that equipoise can balance", got=got, do=do)


def _refused(module: Any) -> Iterator[tuple[str, str]]:
    for name in ("tp", "cp", "ep"):
        if getattr(module, f"{name}_enabled"):
            yield f"{name}_config", f"leave it out: {NO_TEST}"
    if Group.world().size > 1 and module.dp_config is None:
        yield f"{Group.world().size} ranks without a dp_config", "give TransformerTrainModuleConfig a dp_config"
    if module.model.fp8_enabled:
        yield "float8_config", f"leave it out: {NO_TEST}"


def warn_of_untried(module: Any) -> None:
    """Names in one warning all that would work, as far as anybody can tell by reading, and that no test has run."""
    if found := list(_never_ran(module)):
        warnings.warn(
            f"equipoise never ran in OLMo-core with {', '.join(found)}: look at its first logs (balance/tokens, "
            "balance/maxvio_global) before you trust it",
            stacklevel=3,
        )


def _never_ran(module: Any) -> Iterator[str]:
    if module.model.compile_enabled:
        yield "compile_model"
    if "step" in vars(module.optim):
        yield "a compiled optimizer"
    if module.dp_config is not None and (kind := str(module.dp_config.name)) not in ("fsdp", "ddp"):
        yield f"dp_config {kind!r}"
