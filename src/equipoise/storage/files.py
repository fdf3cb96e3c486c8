"""Files and folders that appear whole or not at all, also on a full or read-only disk. Imports no torch."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import OutputError

__all__ = ["as_the_folder", "atomic_folder", "atomic_write", "flush", "output_errors", "sha256", "write_whole"]

FREE_SPACE = "free disk space, or choose another folder"


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside ``path``, then renames: a reader finds the old file or the new one, never half of one.

    Raises OSError; the old file is there still then, and nothing else.
    """
    writing = path.with_name(f".writing-{os.getpid()}-{threading.get_ident()}")
    try:
        with open(writing, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(writing, path)
    finally:
        writing.unlink(missing_ok=True)


def atomic_write(path: Path, content: bytes, *, do: str = FREE_SPACE) -> None:
    """``write_whole`` in a folder that may not exist yet.

    Raises OutputError, with the advice ``do``, when the folder cannot be written or the disk is full.
    """
    with output_errors(path, do):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)


@contextmanager
def atomic_folder(path: Path, *, do: str = FREE_SPACE) -> Iterator[Path]:
    """Yields an empty folder that becomes ``path`` when the block ends without an error; replaces what was there.

    Two processes may build the same folder at the same time: the last one wins, and both find a whole one.
    Raises OutputError, with the advice ``do``, when the folder cannot be written or the disk is full.
    """
    with output_errors(path, do):
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
def output_errors(what: str | Path, do: str = FREE_SPACE) -> Iterator[None]:
    """Turns an OSError of the block into an OutputError that names ``what`` was written and advises ``do``."""
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):  # room is not what is missing
            do = re.sub(r"^free (disk )?space,? (or|then) ", "", do)
        raise OutputError(expected=f"to write {what}", got=error.strerror or str(error), do=do) from None


def sha256(path: Path) -> str:
    """The checksum of a file's content, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_the_folder(path: Path) -> None:
    """Whoever may read the folder may read this file: safetensors makes files for their owner alone."""
    path.chmod(path.parent.stat().st_mode & 0o666)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
