"""Weights of a dense folder read a layer at a time, and those of an MoE folder written one whole file a layer.

model-00001-of-00004.safetensors    what is in no layer: embeddings, the last norm, the head
model-00002-of-00004.safetensors    the first layer, with what was measured of it in the file's metadata; and so on
model.safetensors.index.json        which tensor is in which file

Tensors stay in the dtype of the dense model. A file is there when it is whole.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import DataError
from ...storage.files import atomic_write
from ..models.hf_files import INDEX, weight_files
from .weights import ExpertWeights, FeedForward

__all__ = ["DenseWeights", "moe_tensors", "read_report", "shard_name", "write_index", "write_shard"]

LAYER = re.compile(r"model\.layers\.(\d+)\.")
PARTS = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}  # as every published checkpoint has them
REPORT = "equipoise"  # key of a shard's metadata
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class DenseWeights:
    """The tensors of a folder's safetensors files, one or several; each is read when it is asked for.

    Raises DataError for files that are missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import safe_open

        self.folder = folder
        self.files: dict[str, Path] = {}
        with weight_files(folder) as paths:
            for path in paths:
                with safe_open(path, "pt") as file:  # frequencies are in folders from before transformers 4.32
                    self.files |= {key: path for key in file.keys() if not key.endswith("rotary_emb.inv_freq")}  # noqa: SIM118

    def layer(self, number: int) -> dict[str, Tensor]:
        """What a layer has beside its feed-forward, by name."""
        feed_forward = {f"model.layers.{number}.mlp.{part}.weight" for part in PARTS}
        return self._read(name for name in self._of_layer(number) if name not in feed_forward)

    def feed_forward(self, number: int) -> FeedForward:
        return FeedForward(*self._read(f"model.layers.{number}.mlp.{part}.weight" for part in PARTS).values())

    def dtype(self, number: int) -> torch.dtype:
        """That of a layer's feed-forward."""
        from safetensors import safe_open

        name = f"model.layers.{number}.mlp.gate_proj.weight"
        with safe_open(self.files[name], "pt") as file:
            return DTYPES[file.get_slice(name).get_dtype()]

    def rest(self, *, tied: bool) -> dict[str, Tensor]:
        """What is in no layer; without the head where it is the embeddings."""
        names = [name for name in self.files if LAYER.match(name) is None]
        return self._read(name for name in names if not (tied and name == "lm_head.weight"))

    def parameters(self, *, tied: bool) -> int:
        """How many there are, a head that is the embeddings counted once."""
        return sum(_size(path, name) for name, path in self.files.items() if not (tied and name == "lm_head.weight"))

    def _of_layer(self, number: int) -> list[str]:
        return [name for name in self.files if (match := LAYER.match(name)) and int(match[1]) == number]

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        from safetensors import safe_open

        found: dict[str, Tensor] = {}
        for name in names:
            if name not in self.files:
                raise DataError(
                    expected=f"the tensor {name} in {self.folder}",
                    got="none of this name",
                    do="bring back the files that belong to its config.json",
                )
            with safe_open(self.files[name], "pt") as file:
                found[name] = file.get_tensor(name)
        return found


def moe_tensors(
    model_type: str, number: int, experts: ExpertWeights, router_ED: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The MoE block of a layer under the names of its class, each expert under its own."""
    place = f"model.layers.{number}." + ("block_sparse_moe" if model_type == "mixtral" else "mlp")
    names = MIXTRAL if model_type == "mixtral" else {part: part for part in PARTS}
    found = {f"{place}.gate.weight": router_ED.to(dtype)}
    for expert, (gate_up_FD, down_DF) in enumerate(zip(*experts, strict=True)):
        for part, weight in zip(PARTS, (*gate_up_FD.chunk(2), down_DF), strict=True):
            found[f"{place}.experts.{expert}.{names[part]}.weight"] = weight.to(dtype).contiguous()
    if model_type == "qwen2_moe":  # a shared expert of width 0, which adds nothing
        dim = router_ED.shape[1]
        shapes = {"gate_proj": (0, dim), "up_proj": (0, dim), "down_proj": (dim, 0)}
        found |= {f"{place}.shared_expert.{part}.weight": torch.zeros(shapes[part], dtype=dtype) for part in PARTS}
        found[f"{place}.shared_expert_gate.weight"] = torch.zeros(1, dim, dtype=dtype)
    return found


def shard_name(number: int, layers: int) -> str:
    """The file of a layer, or of what is in none: number 0, the layers from 1."""
    return f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"


def write_shard(path: Path, tensors: Mapping[str, Tensor], report: Mapping[str, Any]) -> None:
    """Raises OutputError when the disk is full; nothing is left of the file then."""
    from safetensors.torch import save

    metadata = {"format": "pt", REPORT: json.dumps(report)}
    atomic_write(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata))


def read_report(path: Path) -> dict[str, Any] | None:
    """What was written with a shard; None where the file is not there or is none."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {})[REPORT])
    except (OSError, ValueError, KeyError, SafetensorError):
        return None


def write_index(folder: Path, layers: int) -> int:
    """The index over all shards; returns the number of parameters."""
    from safetensors import safe_open

    places: dict[str, str] = {}
    parameters = bytes_in_all = 0
    for name in (shard_name(number, layers) for number in range(layers + 1)):
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                count = math.prod(file.get_slice(key).get_shape())
                places[key], parameters = name, parameters + count
                bytes_in_all += count * DTYPES[file.get_slice(key).get_dtype()].itemsize
    index = {"metadata": {"total_size": bytes_in_all}, "weight_map": dict(sorted(places.items()))}
    atomic_write(folder / INDEX, (json.dumps(index, indent=2) + "\n").encode())
    return parameters


def _size(path: Path, name: str) -> int:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return math.prod(file.get_slice(name).get_shape())
