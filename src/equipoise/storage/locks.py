"""Locks between processes; a lock is released with its process, however that ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout  # comes with torch

from ..errors import OutputError
from .files import output_errors

__all__ = ["LOCK_NAME", "is_free", "lock_file", "locked"]

LOCK_NAME = ".lock"
FOREVER = -1.0
MOMENT = 0.2  # that `is_free` may hold a lock which it only looks at


@contextmanager
def lock_file(path: Path, *, do: str) -> Iterator[None]:
    """Holds the lock ``path``, and waits for it as long as it takes; its folder need not exist.

    Raises OutputError, with the advice ``do``, where the file cannot be written.
    """
    with output_errors(path, do):
        lock = _acquire(path, FOREVER)
    assert lock is not None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def locked(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Holds ``folder`` for this process.

    Raises OutputError for a folder that cannot be written, or that another process still holds after ``wait`` seconds.
    """
    path = folder / LOCK_NAME
    with output_errors(path, "free space or choose another folder"):
        lock = _acquire(path, max(wait, MOMENT))
    if lock is None:
        raise OutputError(
            expected=f"{folder} for this process alone",
            got="another process is working in it",
            do="wait for it to end, or choose another --out",
        )
    try:
        yield
    finally:
        lock.release()


def is_free(folder: Path) -> bool:
    """Whether ``folder`` was held once and is no longer: its process has ended, or was killed."""
    path = folder / LOCK_NAME
    try:
        lock = _acquire(path, 0.0) if path.is_file() else None
    except OSError:  # nobody can say, on a disk that cannot be written
        return False
    if lock is not None:
        lock.release()
    return lock is not None


def _acquire(path: Path, wait: float) -> FileLock | None:
    """The held lock; None where another process holds it after ``wait`` seconds. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait)
    except Timeout:
        return None
    return lock
