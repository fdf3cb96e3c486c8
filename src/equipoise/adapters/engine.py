"""A training engine of others: whether it is here, and whether it is the release that our tests train with."""

from __future__ import annotations

import importlib.metadata
import warnings
from dataclasses import dataclass

from ..errors import ConfigError

__all__ = ["Engine"]

_WARNED: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Engine:
    """A training engine by its name, its package, and the release that was tried.

    >>> Engine("Engine", "no-such-package", "1.0").require()
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected Engine, tried with 1.0
      got: no package no-such-package
      do:  pip install no-such-package==1.0
    """

    name: str
    package: str
    tried: str

    def require(self) -> None:
        """Raises ConfigError where it is not installed; warns once of a release that was never tried."""
        try:
            found = importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            raise ConfigError(
                expected=f"{self.name}, tried with {self.tried}",
                got=f"no package {self.package}",
                do=f"pip install {self.package}=={self.tried}",
            ) from None
        if found != self.tried and (self.package, found) not in _WARNED:
            _WARNED.add((self.package, found))
            warnings.warn(
                f"equipoise was tried with {self.name} {self.tried} and not with {found}: look at its first logs "
                "(balance/tokens, balance/maxvio_global) before you trust it",
                stacklevel=2,
            )
