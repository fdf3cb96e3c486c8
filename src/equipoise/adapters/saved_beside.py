"""A balancer's state in a file beside the checkpoint of an engine that writes its own."""

from __future__ import annotations

from pathlib import Path

from ..balancer.balancer import Balancer
from ..distributed import Group
from ..errors import DataError
from ..storage.balancer_file import FILE, read_state, state_file, write_state

__all__ = ["SavedBeside"]


class SavedBeside:
    """For what holds a ``balancer``. Where ranks hold other layers, each of them has a file name of its own."""

    balancer: Balancer

    def _state_file(self) -> tuple[str, bool]:
        """(its name, whether this rank writes it)."""
        return FILE, Group.world().rank == 0

    def save(self, folder: str | Path) -> Path:
        """Writes the balancer's state into a folder that is there. Every rank calls it; one of those with the same
        layers writes.

        Raises OutputError.
        """
        name, writes = self._state_file()
        path = Path(folder) / name
        if writes:
            write_state(self.balancer.state_dict(), path)
        return path

    def load(self, folder: str | Path, *, strict: bool = True) -> list[str]:
        """Goes on from ``save``, after the engine has loaded its model; what was left out, with ``strict=False``.

        Raises DataError where there is none, or one of another training.
        """
        name, _ = self._state_file()
        path = state_file(folder) if name == FILE else Path(folder) / name
        if path is None or not path.is_file():
            raise DataError(
                expected=f"the balancer's state in {folder}",
                got="none",
                do="write it beside each checkpoint with save(folder)",
            )
        return self.balancer.load_state_dict(read_state(path), strict=strict)
