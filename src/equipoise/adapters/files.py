"""The balancer's state as one file beside a checkpoint's own: tensors in safetensors, the rest as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from ..errors import DataError, OutputError

__all__ = ["FILE", "read_state", "write_state"]

FILE = "balancer.safetensors"


def write_state(state: dict[str, Any], path: Path) -> None:
    """All of it or nothing: a file of that name is whole."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}

    def take(value: Any) -> Any:
        if isinstance(value, Tensor):
            tensors[str(len(tensors))] = value.detach().cpu().contiguous().clone()
            return {"$tensor": str(len(tensors) - 1)}
        if isinstance(value, dict):
            return {key: take(inner) for key, inner in value.items()}
        return [take(inner) for inner in value] if isinstance(value, list | tuple) else value

    text, part = json.dumps(take(state)), path.with_suffix(".part")
    try:
        save_file(tensors, part, metadata={"state": text})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(
            expected=f"to write {path}", got=str(error), do="make room, or choose a folder that can be written"
        ) from error


def read_state(path: Path) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise DataError(
            expected=f"the balancer's state in {path.parent}",
            got=f"no {path.name}",
            do="pass a checkpoint that was saved with BalanceCallback",
        )
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dict
            text = file.metadata()["state"]

        def put(value: Any) -> Any:
            if isinstance(value, dict):
                return tensors[value["$tensor"]] if "$tensor" in value else {key: put(v) for key, v in value.items()}
            return [put(inner) for inner in value] if isinstance(value, list) else value

        return put(json.loads(text))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            expected=f"the balancer's state in {path}",
            got=f"a file that is cut short or of another kind ({error})",
            do="resume from the checkpoint before it",
        ) from error
