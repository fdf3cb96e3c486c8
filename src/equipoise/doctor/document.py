"""A file, a folder or a launch line, read into names and values; what it means is decided elsewhere."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .shell import Launch, read_launch

__all__ = ["Document", "flat", "read_document", "read_mapping"]

LARGEST = 4_000_000
CONFIGS = (".json", ".yaml", ".yml", ".toml")
SCRIPTS = ("", ".sh", ".bash", ".zsh", ".slurm", ".sbatch", ".pbs", ".txt", ".cfg", ".args")
CONFIG_OPTIONS = ("config", "job.config_file")


@dataclass(frozen=True)
class Document:
    """``kind`` is "json", "yaml", "toml" or "launch"; ``data`` the names and values, of a launch line its options."""

    name: str
    kind: str
    data: dict[str, Any]
    folder: Path
    launch: Launch = field(default_factory=Launch)

    @property
    def words(self) -> str:
        """The programs and files that a launch line names."""
        return " ".join(self.launch.words)


def read_document(inputs: Sequence[str]) -> Document:
    """One path, or the words of a launch line.

    Raises DataError for a file that cannot be read, is too large or half-written, and ConfigError for no input, or for
    a folder without a configuration or with several.
    """
    if not inputs:
        raise ConfigError(expected="a configuration file, a folder with one, or a launch line", got="nothing",
                          do="equipoise doctor config.json, or: equipoise doctor -- torchrun train.py ...")  # fmt: skip
    path = Path(inputs[0]).expanduser()
    if len(inputs) == 1 and not inputs[0].startswith("-") and not path.exists() and len(inputs[0].split()) == 1:
        raise DataError(expected="a file or a folder", got=f"{inputs[0]}, which is not there",
                        do="check the path; a launch line comes after --")  # fmt: skip
    if len(inputs) > 1 or not path.exists():
        return _launched(" ".join(inputs), "the command line", Path())
    if path.is_dir():
        path = _in_folder(path)
    text = _text(path)
    if path.suffix in CONFIGS:
        return Document(str(path), path.suffix[1:].replace("yml", "yaml"), read_mapping(path), path.parent)
    if path.suffix not in SCRIPTS and not text.startswith("#!"):
        raise ConfigError(expected="a configuration (.json, .yaml, .toml), a script, or a launch line", got=str(path),
                          do="of a script with another suffix, give the launch line behind --")  # fmt: skip
    return _launched(text, str(path), path.parent)


def read_mapping(path: Path) -> dict[str, Any]:
    """The names and values of a JSON, YAML or TOML file. Raises DataError where it holds anything else."""
    text, kind = _text(path), path.suffix[1:].replace("yml", "yaml")
    try:
        data = {"json": json.loads, "toml": tomllib.loads, "yaml": _yaml}[kind](text)
    except ConfigError:  # PyYAML is missing
        raise
    except (ValueError, RecursionError) as error:  # json's and tomllib's errors are ValueErrors
        reason = " ".join(str(error).split())
        raise DataError(expected=f"a whole {kind.upper()} file", got=f"{path}: {reason[:300]}",
                        do="look at that line: is the file half-written, or of another kind?") from None  # fmt: skip
    if not isinstance(data, Mapping) or not data:
        raise DataError(expected=f"names and values in {path}", got=f"{type(data).__name__}, which is no configuration",
                        do="give the file that the trainer reads")  # fmt: skip
    return {str(name): value for name, value in data.items()}


def flat(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots.

    >>> flat({"model": {"name": "qwen3"}, "steps": 3})
    {'model.name': 'qwen3', 'steps': 3}
    """
    found: dict[str, Any] = {}
    for name, value in data.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _launched(text: str, name: str, folder: Path) -> Document:
    launch = read_launch(text)
    data = dict(launch.options)
    files = [data[one] for one in CONFIG_OPTIONS if isinstance(data.get(one), str)]
    for word in (*launch.words, *files):  # `llamafactory-cli train a.yaml --b 1`: options go before the file
        path = folder / Path(word).expanduser()
        if path.suffix in CONFIGS and path.is_file():
            data = read_mapping(path) | data
            name = f"{name}, {word}"
    if not data and not launch.overrides:
        raise DataError(expected="a configuration or a launch line", got=f"{name}, without any --option",
                        do="give a .json, .yaml or .toml file, or the script that starts the training")  # fmt: skip
    return Document(name, "launch", data, folder, launch)


def _in_folder(folder: Path) -> Path:
    if (folder / "config.json").is_file():
        return folder / "config.json"
    found = sorted(one for one in folder.iterdir() if one.suffix in CONFIGS)
    if len(found) == 1:
        return found[0]
    names = ", ".join(one.name for one in found[:8]) or "none"
    raise ConfigError(expected=f"a config.json, or one configuration in {folder}", got=names, do="name the file")


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise DataError(expected="a configuration", got=f"{path} of {path.stat().st_size:,} bytes",
                            do="give the configuration, not weights or data")  # fmt: skip
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(
            expected=f"text in {path}", got="bytes that are no UTF-8", do="name a configuration or a script"
        ) from None
    except OSError as error:
        raise DataError(expected=f"text in {path}", got=str(error), do="check the path and its permissions") from None


def _yaml(text: str) -> Any:
    try:
        import yaml
    except ModuleNotFoundError:
        raise ConfigError(expected="PyYAML, to read YAML", got="it is not installed", do="pip install pyyaml") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
