"""The cache folder, and files that appear in it whole or not at all, also on a full or read-only disk."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock  # comes with torch

from ..errors import OutputError
from .run_record import write_whole

__all__ = ["atomic_folder", "atomic_write", "cache_folder", "one_builder"]

OTHER_CACHE = "free disk space, or set EQUIPOISE_CACHE to a folder you can write"


def cache_folder() -> Path:
    """``$EQUIPOISE_CACHE``, or ``$XDG_CACHE_HOME/equipoise``, or ``~/.cache/equipoise``. It may not exist yet."""
    if own := os.environ.get("EQUIPOISE_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "equipoise"


def atomic_write(path: Path, content: bytes, *, do: str = OTHER_CACHE) -> None:
    """``write_whole`` in a folder that may not exist yet.

    Raises OutputError, with the advice ``do``, when the folder cannot be written or the disk is full.
    """
    with _output_errors(path, do):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


@contextmanager
def atomic_folder(path: Path, *, do: str = OTHER_CACHE) -> Iterator[Path]:
    """Yields an empty folder that becomes ``path`` when the block ends without an error; replaces what was there.

    Two processes may build the same folder at the same time: the last one wins, and both find a whole one.
    Raises OutputError, with the advice ``do``, when the folder cannot be written or the disk is full.
    """
    with _output_errors(path, do):
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".writing-", dir=path.parent))
        try:
            yield building
            while True:
                try:
                    os.rename(building, path)
                    break
                except OSError:
                    if not path.is_dir():
                        raise
                    retired = Path(tempfile.mkdtemp(prefix=".old-", dir=path.parent))
                    with suppress(FileNotFoundError):  # another process was quicker
                        os.rename(path, retired)
                    shutil.rmtree(retired, ignore_errors=True)
        finally:
            shutil.rmtree(building, ignore_errors=True)


@contextmanager
def one_builder(path: Path) -> Iterator[None]:
    """While the block runs, other processes wait that want to build ``path`` too; a killed one lets go by itself.

    Raises OutputError when the lock's file, ``.lock/`` beside the folder of ``path``, cannot be written.
    """
    lock = path.parent.parent / ".lock" / path.name
    with _output_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock)
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextmanager
def _output_errors(path: Path, do: str = OTHER_CACHE) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(expected=f"to write {path}", got=error.strerror or str(error), do=do) from None
