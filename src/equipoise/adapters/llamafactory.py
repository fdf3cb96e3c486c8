"""LLaMA-Factory: ``python -m equipoise.adapters.llamafactory train.yaml`` instead of ``llamafactory-cli train``.

It has no slot for a plugin; so this reads its configuration as it does, takes ``equipoise:`` out, and calls its
``run_exp`` with a callback. Several processes: ``torchrun --nproc-per-node 8 -m equipoise.adapters.llamafactory ...``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from yaml import YAMLError

from ..errors import ConfigError, EquipoiseError
from .engine import Engine
from .front_end import EngineCallback, Settings

__all__ = ["main", "train"]

LLAMA_FACTORY = Engine("LLaMA-Factory", "llamafactory", "0.9.5")
NOT_THE_TRAINER = ("USE_RAY", "USE_MCA", "USE_V1")  # of the environment: other ways to train
OTHER_TRAINERS = ("use_mca", "use_hyper_parallel")  # of its configuration
USAGE = "python -m equipoise.adapters.llamafactory CONFIG.yaml [name=value ...]"


def train(config: Mapping[str, Any], callbacks: Sequence[Any] = ()) -> None:
    """Trains what a configuration of LLaMA-Factory says, balanced by what stands under ``equipoise`` in it.

    Args:
        config: as its YAML file holds it, and ``equipoise: {policies: [...]}``.
        callbacks: further ones of transformers.

    Raises ConfigError without LLaMA-Factory, for a configuration without policies, and for ways to train that are not
    transformers' Trainer.

    >>> train({"stage": "pt"})
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected ...
    """
    LLAMA_FACTORY.require()
    theirs, settings = _split(config)
    tuner = importlib.import_module("llamafactory.train.tuner")
    tuner.run_exp(theirs, callbacks=[*callbacks, EngineCallback(LLAMA_FACTORY, settings)])


def main(arguments: Sequence[str]) -> int:
    """Of the command line: the exit code of an error that is ours, else what ``train`` raises."""
    try:
        LLAMA_FACTORY.require()
        config = _read(arguments)
        _split(config)
    except EquipoiseError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return error.exit_code
    train(config)
    return 0


def _read(arguments: Sequence[str]) -> dict[str, Any]:
    """The file and what is said over it, in the words that LLaMA-Factory's own command takes."""
    omegaconf = importlib.import_module("omegaconf")
    conf, errors = omegaconf.OmegaConf, (OSError, YAMLError, omegaconf.errors.OmegaConfBaseException)
    if not arguments or not arguments[0].endswith((".yaml", ".yml", ".json")):
        raise ConfigError(expected="a configuration of LLaMA-Factory", got=" ".join(arguments) or "nothing", do=USAGE)
    try:
        plain = conf.to_container(conf.merge(conf.load(Path(arguments[0])), conf.from_cli([*arguments[1:]])))
    except errors as error:
        raise ConfigError(
            expected=f"YAML in {arguments[0]}", got=" ".join(str(error).split()), do="begin from one of its examples"
        ) from None
    if not isinstance(plain, dict):
        raise ConfigError(expected=f"names and values in {arguments[0]}", got=type(plain).__name__, do=USAGE)
    return {str(name): value for name, value in plain.items()}


def _split(config: Mapping[str, Any]) -> tuple[dict[str, Any], Settings]:
    """What is LLaMA-Factory's, and what is ours."""
    settings = Settings.read(config.get("equipoise"))
    others = [f"{name}: true" for name in OTHER_TRAINERS if config.get(name)]
    others += [f"{name}=1" for name in NOT_THE_TRAINER if os.environ.get(name, "").lower() in ("true", "y", "1")]
    others += ["stage: ppo"] if config.get("stage") == "ppo" else []
    if others:
        raise ConfigError(
            expected="a training by transformers' Trainer, in processes that torchrun starts",
            got=", ".join(others),
            do="leave it out, or train that without equipoise",
        )
    if settings.policies and (coef := config.get("moe_aux_loss_coef")):
        raise ConfigError(
            expected="one balance loss",
            got=f"moe_aux_loss_coef: {coef} beside equipoise: policies:",
            do="leave moe_aux_loss_coef out, or look first: policies: []",
        )
    return {name: value for name, value in config.items() if name != "equipoise"}, settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
