"""The cache folder: packed text, tokenizers and corpora that are built once for all runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .locks import lock_file

__all__ = ["OTHER_CACHE", "cache_folder", "one_builder"]

OTHER_CACHE = "free disk space, or set EQUIPOISE_CACHE to a folder you can write"  # the advice of an OutputError


def cache_folder() -> Path:
    """``$EQUIPOISE_CACHE``, or ``$XDG_CACHE_HOME/equipoise``, or ``~/.cache/equipoise``. It may not exist yet."""
    if own := os.environ.get("EQUIPOISE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "equipoise"


@contextmanager
def one_builder(path: Path) -> Iterator[None]:
    """While the block runs, other processes that build ``path`` too wait; a killed one releases its lock.

    Raises OutputError when the lock's file, ``.lock/`` beside the folder of ``path``, cannot be written.
    """
    with lock_file(path.parent.parent / ".lock" / path.name, do=OTHER_CACHE):
        yield
