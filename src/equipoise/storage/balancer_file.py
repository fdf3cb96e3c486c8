"""The balancer's state as one file beside a checkpoint's own: tensors as safetensors writes them, the rest as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import DataError
from .files import output_errors, write_whole
from .tensors import join_tensors, split_tensors

__all__ = ["FILE", "NAMES", "read_state", "remove_state", "state_file", "write_state"]

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


def write_state(state: dict[str, Any], path: Path) -> None:
    """Writes ``state`` whole or not at all. Raises OutputError."""
    from safetensors.torch import save

    plain, tensors = split_tensors(state)
    with output_errors(path, "make room, or choose a folder that can be written"):
        write_whole(path, save(tensors, metadata={"state": json.dumps(plain)}))


def read_state(path: Path) -> dict[str, Any]:
    """The state that ``write_state`` wrote. Raises DataError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            text = file.metadata()["state"]
        return join_tensors(json.loads(text), tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            expected=f"the balancer's state in {path}",
            got=f"a file that is cut short or of another kind ({error})",
            do="take the checkpoint before it",
        ) from error
