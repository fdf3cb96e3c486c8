"""Prints the path that ms-swift's ``--external_plugins`` takes."""

from __future__ import annotations

from . import PLUGIN

if __name__ == "__main__":
    print(PLUGIN)
