"""Numbers of a configuration that have to be above zero."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from ...errors import ConfigError

__all__ = ["above_zero"]


def above_zero(config: Any, table: str, *may_be_zero: str) -> None:
    """Raises ConfigError for a number of a dataclass that is below 0, or 0 where its name is not given.

    >>> from equipoise.lab.diffusion.config import ModelConfig
    >>> above_zero(ModelConfig(), "model.")
    """
    for one in fields(config):
        value = getattr(config, one.name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if not (value > 0 or (value == 0 and one.name in may_be_zero)):
            bound = "of 0 or more" if one.name in may_be_zero else "above 0"
            raise ConfigError(
                expected=f"{table}{one.name} {bound}",
                got=f"{one.name} = {value}",
                do=f"the default is {one.default}; leave it out",
            )
