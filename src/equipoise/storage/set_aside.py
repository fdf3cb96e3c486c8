"""What is to be replaced stays until what replaces it has begun: ``--overwrite`` never ends with nothing. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .files import output_errors

__all__ = ["bring_back", "set_aside"]

ASIDE, FORGOTTEN = ".replaced", ".replaced-forgotten"


@contextmanager
def set_aside(folder: Path, names: Iterable[str], *, do: str = "choose another --out") -> Iterator[Callable[[], None]]:
    """Moves these files of ``folder`` out of the way; yields what is to be called once their successors are worth more.

    Before that an error of the block, or the next call after a kill, brings them back in place of what stands there.
    Raises OutputError, with the advice ``do``, where they cannot be moved. The caller holds the folder's lock.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "a").write_text("old")
    >>> try:
    ...     with set_aside(folder, ["a", "b"]):
    ...         raise OSError
    ... except OSError:
    ...     (folder / "a").read_text()
    'old'
    """
    names, aside = list(names), folder / ASIDE
    with output_errors(folder, do):
        bring_back(folder)
        found = [name for name in names if (folder / name).exists()]
        if found:
            aside.mkdir()
        for name in found:
            os.replace(folder / name, aside / name)

    def forget() -> None:
        if aside.is_dir():  # by one rename: half of the old must never come back over the new
            os.replace(aside, folder / FORGOTTEN)
        shutil.rmtree(folder / FORGOTTEN, ignore_errors=True)

    try:
        yield forget
    except BaseException:
        if aside.is_dir():
            for name in names:
                _remove(folder / name)
            bring_back(folder)
        raise
    forget()


def bring_back(folder: Path) -> None:
    """What a process that was killed had set aside, in place of what stands there."""
    shutil.rmtree(folder / FORGOTTEN, ignore_errors=True)
    aside = folder / ASIDE
    for path in list(aside.iterdir()) if aside.is_dir() else ():
        _remove(folder / path.name)
        os.replace(path, folder / path.name)
    shutil.rmtree(aside, ignore_errors=True)


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
