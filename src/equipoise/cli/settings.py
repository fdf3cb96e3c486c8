"""The options that `train` and `compare` share: a file, flags for what changes most, ``--set`` for the rest."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ..lab.config.schema import CompareConfig, RunConfig, load_config, parse_set

__all__ = ["add_settings", "read", "settings"]

C = TypeVar("C", RunConfig, CompareConfig)
GIVEN_LR = 3e-4  # for a pretrained model, which the rate of a new one would damage

# flag -> (setting, type, metavar, help)
FLAGS: dict[str, tuple[str, type, str, str]] = {
    "--model": (
        "model.folder",
        str,
        "FOLDER",
        "a Hugging Face MoE model to go on from, with its own tokenizer; --lr 3e-4",
    ),
    "--data": (
        "data.data",
        str,
        "PATH",
        "your own text: .jsonl[.gz|.xz|.zst], parquet, a folder per domain, a data set",
    ),
    "--domains": ("data.domains", str, "A,B", "only these domains"),
    "--steps": ("train.steps", int, "N", "optimizer steps"),
    "--lr": ("train.lr", float, "X", "peak learning rate"),
    "--seed": ("train.seed", int, "N", "of the weights and of the order of the data"),
    "--log": ("train.log", str, "A,B", "wandb, mlflow: the curves go there too, under the same names"),
    "--experts": ("model.experts", int, "N", "experts per layer"),
    "--top-k": ("model.top_k", int, "N", "experts per token"),
}


def add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("settings (defaults < the file < these)")
    for flag, (setting, kind, metavar, text) in FLAGS.items():
        group.add_argument(flag, dest=setting, type=kind, metavar=metavar, help=f"{text} ({setting})")
    group.add_argument("--set", dest="set", action="append", default=[], metavar="NAME=VALUE",
                       help="any other setting, e.g. --set train.precision=fp32; may be repeated")  # fmt: skip
    group.add_argument("--print-config", action="store_true", help="print all settings as a TOML file and end")


def settings(arguments: argparse.Namespace, presets: dict[str, Any] | None = None) -> dict[str, Any]:
    """{dotted name: value} from the command line: presets < flags < --set."""
    values = dict(presets or {})
    if getattr(arguments, "model.folder") is not None and arguments.config is None:
        values["train.lr"] = GIVEN_LR
    for setting, *_ in FLAGS.values():
        if getattr(arguments, setting) is not None:
            values[setting] = getattr(arguments, setting)
    return values | parse_set(arguments.set)


def read(cls: type[C], arguments: argparse.Namespace, values: dict[str, Any]) -> C:
    """The configuration; paths become absolute, so that a run can be resumed from any folder."""
    config = load_config(cls, arguments.config, values)
    if config.data.data is not None:
        config = replace(config, data=replace(config.data, data=_absolute(config.data.data)))
    if config.model.folder is None:
        return config
    from ..lab.models.pretrained import adopt

    return adopt(replace(config, model=replace(config.model, folder=_absolute(config.model.folder))))


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())
