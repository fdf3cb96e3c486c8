"""ms-swift: the callback that ``--external_plugins`` and ``--callbacks equipoise`` put into its Trainer.

ms-swift loads a plugin by its path, and puts the plugin's folder in front of where Python looks for modules: hence a
folder that holds nothing else. ``python -m equipoise.adapters.ms_swift`` prints the path.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...errors import ConfigError
from ..engine import Engine
from ..front_end import EngineCallback, Settings
from ..tokens import COUNTED

__all__ = ["PLUGIN", "VARIABLE", "callback", "register", "settings"]

MS_SWIFT = Engine("ms-swift", "ms-swift", "4.6.0")
PLUGIN = Path(__file__).parent / "equipoise_plugin.py"
VARIABLE = "EQUIPOISE_POLICIES"
FILES = (".yaml", ".yml", ".json")


def settings(text: str | None) -> Settings:
    """What ``EQUIPOISE_POLICIES`` says: YAML or JSON, or the path of a file of it.

    Args:
        text: a list of policies, or a table with ``policies`` and further ``Settings``.

    Raises ConfigError.

    >>> settings("[global@0.001, z]").policies
    ['global@0.001', 'z']
    """
    if not text:
        raise ConfigError(
            expected=f"policies in the environment variable {VARIABLE}",
            got="nothing",
            do=f"{VARIABLE}='[]' measures and changes nothing; {VARIABLE}=global@1e-3 balances",
        )
    try:
        data = yaml.safe_load(Path(text).read_text(encoding="utf-8") if text.endswith(FILES) else text)
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            expected=f"YAML or JSON in {VARIABLE}, or the path of a file of it",
            got=" ".join(str(error).split()),
            do=f"for example {VARIABLE}='[global@0.001, z]'",
        ) from None
    return Settings.read(data if isinstance(data, Mapping) else {"policies": data})


def callback(args: Any, trainer: Any) -> EngineCallback:
    """What ms-swift makes for ``--callbacks equipoise``. Raises ConfigError where something is balanced twice."""
    asked = settings(os.environ.get(VARIABLE))
    if asked.policies and (coef := getattr(args, "router_aux_loss_coef", 0)):
        raise ConfigError(
            expected="one balance loss: ms-swift turns the model's own on again at every batch",
            got=f"--router_aux_loss_coef {coef:g} beside {VARIABLE}",
            do=f"leave --router_aux_loss_coef out, or look first: {VARIABLE}='[]'",
        )
    if (shards := getattr(getattr(trainer, "template", None), "sequence_parallel_size", 1)) > 1:
        raise ConfigError(
            expected="whole sequences on every rank",
            got=f"--sequence_parallel_size {shards}",
            do="leave it out: equipoise was never tried with it",
        )
    # Its _prepare_inputs writes beside a batch's tokens and leaves them as they are.
    options = {} if asked.tokens else {"tokens": COUNTED}
    return EngineCallback(MS_SWIFT, asked, **options)


def register() -> None:
    """Makes ``--callbacks equipoise`` known. Raises ConfigError without ms-swift."""
    MS_SWIFT.require()
    importlib.import_module("swift.callbacks").callbacks_map["equipoise"] = callback
    print("equipoise is loaded: --callbacks equipoise puts it to work", flush=True)
