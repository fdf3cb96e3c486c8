"""What the user says beside the file: the engine, ranks, micro-batch, accumulation, the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError

__all__ = ["Options", "integer", "number"]


@dataclass(frozen=True)
class Options:
    """``engine`` may carry a version: ``trl==1.9.0``; ``expert_parallel`` ranks share out the experts of a layer."""

    engine: str | None = None
    world: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    expert_parallel: int | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        for name in ("world", "micro_batch", "accumulation", "expert_parallel"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(expected=f"--{name.replace('_', '-')} of at least 1", got=str(value),
                                  do="count from 1")  # fmt: skip
        if self.world and self.expert_parallel and self.world % self.expert_parallel:
            raise ConfigError(expected="--world as a multiple of --expert-parallel",
                              got=f"{self.world} and {self.expert_parallel}", do="change one of them")  # fmt: skip

    @property
    def version(self) -> tuple[int, ...] | None:
        """The version that ``--engine`` names, as numbers."""
        text = (self.engine or "").partition("==")[2]
        if not text:
            return None
        numbers = text.split(".")
        if not all(part.isdigit() for part in numbers):
            raise ConfigError(
                expected="a version in numbers, e.g. --engine trl==1.9.0", got=text, do="leave the rest out"
            )
        return tuple(int(part) for part in numbers)


def number(data: Mapping[str, Any], name: str, default: float | None = None) -> float | None:
    """A number; also one that YAML reads as text, as it does 1e-3. Raises ConfigError for what is no number."""
    value = data.get(name)
    if value is None:
        return default
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        do = "put the number in place of the variable" if "$" in str(value) else "write it as 0.001"
        raise ConfigError(expected=f"a number for {name}", got=repr(value), do=do) from None


def integer(data: Mapping[str, Any], name: str, default: int | None = None) -> int | None:
    """A whole number, None for a ${variable} that a script sets elsewhere. Raises ConfigError for anything else."""
    value = data.get(name)
    if value is None:
        return default
    if isinstance(value, str) and "$" in value:
        return None
    found = number(data, name)
    if found is None or found != int(found):
        raise ConfigError(expected=f"a whole number for {name}", got=repr(value), do="write it in digits")
    return int(found)
