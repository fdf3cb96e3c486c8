"""Every error a user can meet: what was expected, what came, and what to do about it.

    EquipoiseError                 exit code 1
    ├── ConfigError  (ValueError)    2   an argument, a name or a configuration that cannot work
    ├── InputError   (ValueError)    2   tensors that cannot be routed: NaN logits, K > E, no valid token
    ├── StateError   (RuntimeError)  3   calls in an order that would train something else than asked
    │   └── DivergedError (RuntimeError) 1   a loss or a gradient that became NaN or infinite
    ├── DataError    (ValueError)    4   a corpus, a file or a checkpoint that cannot be read
    └── OutputError  (OSError)       5   a folder that cannot be written, or would be overwritten

A command that Ctrl-C ends exits with 130, after it has saved what it had.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

__all__ = [
    "ConfigError",
    "DataError",
    "DivergedError",
    "EquipoiseError",
    "InputError",
    "OutputError",
    "StateError",
    "described",
    "unknown_name",
]


class EquipoiseError(Exception):
    """The root of the tree; ``expected``, ``got`` and ``do`` are one short phrase each.

    >>> raise ConfigError(expected="top_k <= num_experts", got="top_k=9, num_experts=8", do="lower top_k")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected top_k <= num_experts
      got: top_k=9, num_experts=8
      do:  lower top_k
    """

    exit_code = 1

    def __init__(self, *, expected: str, got: str, do: str) -> None:
        self.expected, self.got, self.do = expected, got, do
        super().__init__(f"expected {expected}\n  got: {got}\n  do:  {do}")

    def __reduce__(self):  # keyword-only arguments do not survive the default pickling (worker processes)
        return _rebuild, (type(self), self.expected, self.got, self.do)


class ConfigError(EquipoiseError, ValueError):
    exit_code = 2


class InputError(EquipoiseError, ValueError):
    exit_code = 2


class StateError(EquipoiseError, RuntimeError):
    exit_code = 3


class DivergedError(StateError):
    exit_code = 1


class DataError(EquipoiseError, ValueError):
    exit_code = 4


class OutputError(EquipoiseError, OSError):
    exit_code = 5


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """The error for a name that is not in a list: suggests the nearest, then lists all.

    >>> print(unknown_name("gate", "softmx", ["sigmoid", "softmax"]))
    expected a gate: sigmoid, softmax
      got: 'softmx'
      do:  did you mean 'softmax'?
    """
    names = sorted(known)
    shown = map(repr, names) if any("," in one for one in names) else names  # a comma would part what is one name
    near = difflib.get_close_matches(str(name), names, n=1)
    return ConfigError(
        expected=f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}: {', '.join(shown)}",
        got=repr(name),
        do=f"did you mean {near[0]!r}?" if near else "choose one of these",
    )


def described(value: Any) -> str:
    """What came in place of a tensor that was expected, or which tensor.

    >>> described([1, 2])
    'list'
    """
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return type(value).__name__


def _rebuild(cls: type[EquipoiseError], expected: str, got: str, do: str) -> EquipoiseError:
    return cls(expected=expected, got=got, do=do)
