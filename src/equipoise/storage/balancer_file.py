"""The balancer's state as one file beside a checkpoint's own: tensors as safetensors writes them, the rest as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import output_errors, write_whole
from .tensors import join_tensors, split_tensors

__all__ = ["FILE", "NAMES", "pack_state", "read_state", "remove_state", "state_file", "unpack_state", "write_state"]

FILE = "balancer.equipoise"  # not *.safetensors, *.bin or *.pt: servers load every such file of a folder as weights
NAMES = (FILE, "balancer.safetensors")  # its former name


def state_file(folder: str | Path) -> Path | None:
    """The state file in a checkpoint, or in the checkpoint around an adapter's folder; None where there is none."""
    folder = Path(folder)
    places = [folder, folder.parent] if (folder / "adapter_config.json").is_file() else [folder]
    return next((place / name for place in places for name in NAMES if (place / name).is_file()), None)


def remove_state(folder: Path) -> None:
    """Removes the state that an earlier training left in a folder."""
    for name in NAMES:
        (folder / name).unlink(missing_ok=True)


def pack_state(state: dict[str, Any]) -> bytes:
    """The file's content, for an engine whose checkpoints are no folder of files."""
    from safetensors.torch import save

    plain, tensors = split_tensors(state)
    return save(tensors, metadata={"state": json.dumps(plain)})


def unpack_state(content: bytes) -> dict[str, Any]:
    """The inverse of ``pack_state``. Raises ValueError for other bytes.

    >>> unpack_state(pack_state({"step": 3, "loads": [1.5]}))
    {'step': 3, 'loads': [1.5]}
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        head = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])  # as safetensors writes it
        return join_tensors(json.loads(head["__metadata__"]["state"]), load(content))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(str(error)) from error


def write_state(state: dict[str, Any], path: Path) -> None:
    """Writes ``state`` whole or not at all. Raises OutputError."""
    with output_errors(path, "make room, or choose a folder that can be written"):
        write_whole(path, pack_state(state))


def read_state(path: Path) -> dict[str, Any]:
    """The state that ``write_state`` wrote. Raises DataError for any other file."""
    try:
        return unpack_state(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(
            expected=f"the balancer's state in {path}",
            got=f"a file that is cut short or of another kind ({error})",
            do="take the checkpoint before it",
        ) from error
