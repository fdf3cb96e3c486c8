"""Frozen dataclasses to and from plain dictionaries and TOML: strict about names and types, with a suggestion for each.

A nested setting is named by its dotted path (``train.lr``), in files, in ``--set`` and in every message.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import tomli_w

from ...errors import ConfigError
from ...storage.codec import FieldError, MissingField, Rules, UnknownField, decode, encode, toml_value

__all__ = ["from_dict", "keys", "load_at", "load_toml", "merge", "parse_set", "to_toml"]

C = TypeVar("C")
RULES = Rules(finite=True, comma_lists=True)


def from_dict(cls: type[C], data: Mapping[str, Any], where: str = "", root: type | None = None) -> C:
    """Builds dataclass ``cls`` from nested dictionaries; what is missing keeps its default.

    ``where`` is the dotted path of ``data`` and ``root`` the dataclass at its start, for messages.
    Raises ConfigError for an unknown key (with the nearest known one) and for a value of another type.
    """
    try:
        return decode(cls, data, RULES, where)
    except UnknownField as error:
        raise _unknown_key(error, root or cls) from None
    except MissingField as error:
        name = error.path.rpartition(".")[2]
        raise ConfigError(expected=f"{error.path} to be set", got="nothing", do=f"add {name} = ...") from None
    except FieldError as error:
        raise ConfigError(
            expected=f"{error.path} to be {error.expected}", got=error.got, do=f"set it to {error.expected}"
        ) from None


def to_toml(config: Any) -> str:
    """The text of a TOML file that loads to the same dataclass. Settings that are None are left out.

    >>> from equipoise.lab.config.schema import DataConfig
    >>> print(to_toml(DataConfig(domains=("python", "english"))))
    domains = [
        "python",
        "english",
    ]
    sequence_length = 256
    mix = "micro_batch"
    """
    return tomli_w.dumps(_told(encode(config))).removesuffix("\n")


def load_toml(path: str | Path) -> dict[str, Any]:
    """Reads a TOML file. Raises ConfigError when it is missing, is not UTF-8 or does not parse."""
    try:
        return tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(expected=f"a TOML file at {path}", got=error.strerror or str(error),
                          do="check the path; --print-config writes a file to begin with") from None  # fmt: skip
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            expected=f"TOML in {path}",
            got=str(error),
            do="begin from a file that --print-config writes: one setting a line, strings in quotes",
        ) from None


def parse_set(items: Iterable[str]) -> dict[str, Any]:
    """``--set`` arguments to {dotted path: value}; a value is TOML, and what is not TOML is a string.

    >>> parse_set(["train.lr=1e-3", "data.mix=sequence", "train.tensorboard=false"])
    {'train.lr': 0.001, 'data.mix': 'sequence', 'train.tensorboard': False}
    """
    values: dict[str, Any] = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise ConfigError(expected="--set name=value", got=repr(item), do="for example --set train.lr=1e-3")
        values[key.strip()] = toml_value(text)
    return values


def merge(data: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of nested ``data`` with dotted ``overrides`` written over it.

    >>> merge({"train": {"steps": 9, "lr": 1.0}}, {"train.lr": 0.5, "seeds": 2})
    {'train': {'steps': 9, 'lr': 0.5}, 'seeds': 2}
    """
    merged = {key: merge(value, {}) if isinstance(value, Mapping) else value for key, value in data.items()}
    for path, value in overrides.items():
        *tables, name = path.split(".")
        inner = merged
        for table in tables:
            inner = inner.setdefault(table, {})
            if not isinstance(inner, dict):
                raise ConfigError(
                    expected=f"{path} to be inside a table", got=f"{table} is a value", do="check the name"
                )
        inner[name] = value
    return merged


def load_at(cls: type[C], path: Path | None, values: Mapping[str, Any] | None, *paths: str) -> C:
    """``cls`` from its defaults, then the TOML file at ``path``, then ``values`` {dotted name: value}.

    ``paths``: settings of ``data`` that are files or folders; they become absolute: a run goes on from anywhere.
    Raises ConfigError, as `from_dict`.
    """
    config: Any = from_dict(cls, merge(load_toml(path) if path else {}, values or {}))
    given = {name: getattr(config.data, name) for name in paths}
    absolute = {name: str(Path(one).expanduser().resolve()) for name, one in given.items() if one is not None}
    return from_dict(cls, {**vars(config), "data": {**vars(config.data), **absolute}})


def keys(cls: type) -> Iterator[str]:
    """All dotted paths of a dataclass, tables included."""
    hints = get_type_hints(cls)
    for f in fields(cls):
        yield f.name
        if is_dataclass(hints[f.name]):
            yield from (f"{f.name}.{key}" for key in keys(hints[f.name]))


def _unknown_key(error: UnknownField, root: type) -> ConfigError:
    path, where = error.path, f"{error.table}." if error.table else ""
    known = list(dict.fromkeys([where + key for key in keys(error.cls)] + list(keys(root))))
    name = path.rsplit(".", 1)[-1]
    near = [key for key in known if key.rsplit(".", 1)[-1] == name] or difflib.get_close_matches(path, known, n=1)
    if not near:  # "stpes" is near to "steps", not to "train.steps"
        last = {key.rsplit(".", 1)[-1]: key for key in known}
        near = [last[match] for match in difflib.get_close_matches(name, last, n=1)]
    level = [where + f.name for f in fields(error.cls)]
    return ConfigError(
        expected=f"a setting: {', '.join(level)}",
        got=path,
        do=f"did you mean {near[0]}?" if near else "remove it; --print-config lists all settings",
    )


def _told(value: Any) -> Any:
    """Without what is None, which TOML has not."""
    match value:
        case dict():
            return {key: _told(part) for key, part in value.items() if part is not None}
        case list():
            return [_told(part) for part in value]
    return value
