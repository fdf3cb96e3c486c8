"""Dataclasses to and from the data of JSON and TOML, with errors that name the field. Imports no torch.

encode(config)                a dataclass as dictionaries, lists, numbers, strings, booleans and None
decode(Config, data, RULES)   the inverse, checked against the annotations
without_nan(data)             JSON has no NaN: null takes its place, and `Rules.null_is_nan` reads it back
"""

from __future__ import annotations

import functools
import math
import tomllib
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["FieldError", "MissingField", "Rules", "UnknownField", "convert", "decode", "encode", "toml_value",
           "without_nan"]  # fmt: skip

C = TypeVar("C")
WORDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}
MANY = {int: "whole numbers", float: "numbers", str: "strings", bool: "booleans"}


@dataclass(frozen=True)
class Rules:
    """What ``decode`` accepts beside exact types. An int is always a float, and a bool is never a number."""

    finite: bool = False  # NaN and infinity are refused
    whole_floats: bool = False  # 3.0 is a whole number
    null_is_nan: bool = False  # null, where a float is expected, is NaN
    comma_lists: bool = False  # "a,b" is a tuple of strings
    unknown_fields: bool = False  # fields that the dataclass does not have are left out: a later version wrote them


class FieldError(ValueError):
    """A value that does not fit its field. ``path`` is dotted: ``train.betas[0]``."""

    def __init__(self, path: str, expected: str, got: str) -> None:
        super().__init__(f"expected {path} to be {expected}, got {got}")
        self.path, self.expected, self.got = path, expected, got


class MissingField(FieldError):
    """A field without a default that is not in the data."""


class UnknownField(FieldError):
    """A field that the dataclass ``cls`` does not have; ``table`` is the path of that dataclass, "" at the root."""

    def __init__(self, path: str, cls: type, table: str) -> None:
        super().__init__(path, f"a field of {cls.__name__}", "an unknown one")
        self.cls, self.table = cls, table


def decode(cls: type[C], data: Mapping[str, Any], rules: Rules, path: str = "") -> C:
    """Builds dataclass ``cls`` from nested dictionaries; fields that are not there keep their defaults.

    ``path`` leads to ``data`` from the root, for messages. Raises FieldError, or what the dataclass itself raises.

    >>> @dataclass
    ... class Point:
    ...     x: float
    ...     names: tuple[str, ...] = ()
    >>> decode(Point, {"x": 1, "names": ["a"]}, Rules())
    Point(x=1.0, names=('a',))
    >>> decode(Point, {"x": "far"}, Rules())
    Traceback (most recent call last):
    equipoise.storage.codec.FieldError: expected x to be a number, got 'far'
    """
    if not isinstance(data, Mapping):
        raise FieldError(path or cls.__name__, "a table", repr(data))
    known, required = _shape(cls)
    inside = f"{path}." if path else ""
    if not rules.unknown_fields:
        for key in data:
            if key not in known:
                raise UnknownField(f"{inside}{key}", cls, path)
    for name in required:
        if name not in data:
            raise MissingField(f"{inside}{name}", "set", "nothing")
    return cls(**{k: convert(hint, data[k], f"{inside}{k}", rules) for k, hint in known.items() if k in data})


def convert(hint: Any, value: Any, path: str, rules: Rules) -> Any:
    """``value`` as the annotated type ``hint``. Raises FieldError, which names ``path``."""
    if hint in WORDS:
        return _number(hint, value, path, rules) if hint in (int, float) else _exactly(hint, value, path)
    if hint is Any:
        return value
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return convert(next(one for one in args if one is not type(None)), value, path, rules)
    if is_dataclass(hint) and isinstance(hint, type):
        if isinstance(value, hint):
            return value
        if isinstance(value, Mapping):
            return decode(hint, value, rules, path)
    elif origin is tuple:
        if rules.comma_lists and isinstance(value, str) and args[0] is str:
            value = [part.strip() for part in value.split(",") if part.strip()]
        if isinstance(value, list | tuple) and (args[-1] is Ellipsis or len(args) == len(value)):
            kinds = args[:1] * len(value) if args[-1] is Ellipsis else args
            return tuple(convert(kind, value[i], f"{path}[{i}]", rules) for i, kind in enumerate(kinds))
    elif origin is list or hint is list:
        if isinstance(value, list | tuple):
            inner = args[0] if args else Any
            if _all_are(inner, value, rules):
                return list(value)
            return [convert(inner, one, f"{path}[{i}]", rules) for i, one in enumerate(value)]
    elif (origin is dict or hint is dict) and isinstance(value, Mapping):
        inner = args[1] if args else Any
        if _all_are(inner, value.values(), rules):
            return dict(value)
        return {key: convert(inner, one, f"{path}.{key}", rules) for key, one in value.items()}
    raise FieldError(path, _words(hint, rules), repr(value))


def encode(value: Any) -> Any:
    """The plain form of a dataclass; tuples become lists.

    >>> encode(Rules())["finite"]
    False
    """
    return _plain(asdict(value))


def without_nan(value: Any) -> Any:
    """The same data with NaN and infinity as None, and keys as strings: what JSON can hold.

    >>> without_nan({"a": (1.0, math.nan)})
    {'a': [1.0, None]}
    """
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {str(key): without_nan(one) for key, one in value.items()}
        case list() | tuple():
            return [without_nan(one) for one in value]
    return value


def toml_value(text: str) -> Any:
    """A value as TOML writes it; what is not TOML is a string.

    >>> toml_value("1e-3"), toml_value("[1, 2]"), toml_value("sequence")
    (0.001, [1, 2], 'sequence')
    """
    try:
        parsed = tomllib.loads(f"v = {text.strip()}")
    except tomllib.TOMLDecodeError:
        return text.strip()
    return parsed["v"] if len(parsed) == 1 else text.strip()


@functools.cache
def _shape(cls: type) -> tuple[dict[str, Any], list[str]]:
    """Annotations of the fields, resolved once for each class, and the names of those without a default."""
    hints, own = get_type_hints(cls), fields(cls)
    required = [f.name for f in own if f.default is MISSING and f.default_factory is MISSING]
    return {f.name: hints[f.name] for f in own}, required


def _all_are(hint: Any, values: Iterable[Any], rules: Rules) -> bool:
    """Whether nothing has to be changed or checked one by one: loads and metrics are long lists of one type."""
    return hint is Any or (hint in WORDS and not (hint is float and rules.finite) and set(map(type, values)) <= {hint})


def _number(hint: type, value: Any, path: str, rules: Rules) -> Any:
    if value is None and hint is float and rules.null_is_nan:
        return math.nan
    if isinstance(value, int | float) and not isinstance(value, bool):
        if hint is float and (not rules.finite or math.isfinite(value)):
            return float(value)
        if hint is int and (isinstance(value, int) or (rules.whole_floats and value.is_integer())):
            return int(value)
    raise FieldError(path, _words(hint, rules), repr(value))


def _exactly(hint: type, value: Any, path: str) -> Any:
    if type(value) is hint:
        return value
    raise FieldError(path, WORDS[hint], repr(value))


def _words(hint: Any, rules: Rules, *, many: bool = False) -> str:
    """What a hint stands for, as a message names it.

    >>> _words(tuple[float, float], Rules(finite=True)), _words(list[list[int]], Rules())
    ('a list of 2 finite numbers', 'a list of lists of whole numbers')
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin in (list, tuple) or hint is list:
        count = f"{len(args)} " if origin is tuple and args[-1] is not Ellipsis else ""
        inner = f" of {count}{_words(args[0], rules, many=True)}" if args else ""
        return ("lists" if many else "a list") + inner
    if is_dataclass(hint) or origin is dict or hint is dict:
        return "tables" if many else "a table"
    if hint is float and rules.finite:
        return "finite numbers" if many else "a finite number"
    return (MANY if many else WORDS).get(hint, str(hint))


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_plain(inner) for inner in value]
    return value
