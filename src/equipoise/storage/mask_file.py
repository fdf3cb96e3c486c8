"""Routing masks by token id as one file beside a model's weights: eight experts of an id to a byte."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from .balancer_file import pack_state, unpack_state
from .files import output_errors, write_whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["MASKS", "mask_file", "read_masks", "write_masks"]

MASKS = "routing_masks.equipoise"  # not *.safetensors: servers load every such file of a folder as weights
FORMAT = 1


def mask_file(folder: str | Path) -> Path | None:
    """The file in a folder; None where there is none.

    >>> mask_file("nowhere") is None
    True
    """
    path = Path(folder) / MASKS
    return path if path.is_file() else None


def write_masks(masks: Mapping[str, Tensor], folder: str | Path) -> Path:
    """Writes masks, bool (V, E) on the CPU by router name, whole or not at all. Raises OutputError."""
    import torch

    path, routers = Path(folder) / MASKS, {}
    for name, visible_VE in masks.items():
        packed = torch.from_numpy(np.packbits(visible_VE.numpy(), axis=1))
        routers[name] = {"experts": visible_VE.shape[1], "visible": packed}
    with output_errors(path, "make room, or choose a folder that can be written"):
        write_whole(path, pack_state({"format": FORMAT, "routers": routers}))
    return path


def read_masks(folder: str | Path) -> dict[str, Tensor]:
    """What `write_masks` wrote. Raises DataError where there is no such file, or one that cannot be read."""
    import torch

    path = Path(folder) / MASKS
    expected = f"routing masks in {path}"
    try:
        state: dict[str, Any] = unpack_state(path.read_bytes())
        if state["format"] > FORMAT:
            raise ValueError(f"format {state['format']}, newer than this version of equipoise reads ({FORMAT})")
        for name, one in state["routers"].items():
            if one["visible"].shape[1] != -(-one["experts"] // 8):
                raise ValueError(f"{one['experts']} experts in {one['visible'].shape[1]} bytes at {name!r}")
        return {
            name: torch.from_numpy(np.unpackbits(one["visible"].numpy(), axis=1, count=one["experts"]).astype(bool))
            for name, one in state["routers"].items()
        }
    except FileNotFoundError:
        raise DataError(
            expected=expected,
            got="no such file",
            do="pass the folder that save_masks wrote to, or equipoise export --masks",
        ) from None
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            expected=expected,
            got=f"a file that is cut short or of another kind ({error})",
            do="write it again with save_masks, or export the run again",
        ) from None
