"""The files of a Hugging Face folder, read and written without transformers.

config.json, generation_config.json       what AutoModelForCausalLM.from_pretrained reads
model.safetensors                         weights, each expert under its own keys
tokenizer.json, tokenizer_config.json     what AutoTokenizer.from_pretrained reads
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from ...errors import DataError, OutputError
from ...storage.adaptive_top_k_file import FILE
from ...storage.mask_file import MASKS
from ..config.schema import ModelConfig
from ..data.tokenizer import END_ID, END_OF_TEXT
from .hf_weights import split_experts, to_hugging_face

__all__ = [
    "BESIDE",
    "INDEX",
    "TOKENIZER",
    "WEIGHTS",
    "WRITTEN",
    "read_settings",
    "read_weights",
    "safetensors_errors",
    "weight_files",
    "write_json",
    "write_tokenizer",
    "write_weights",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER = "tokenizer.json"
# Files of a tokenizer, and of how the model is prompted and generates.
BESIDE = (TOKENIZER, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
          "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")  # fmt: skip
WRITTEN = {*BESIDE, WEIGHTS, INDEX, FILE, MASKS, "config.json"}


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The content of ``config.json``. Raises DataError where there is none, or no settings in it."""
    path = Path(folder) / "config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError(f"a {type(settings).__name__}")
    except (OSError, ValueError) as error:
        raise DataError(
            expected=f"a Hugging Face folder: settings in {path}",
            got=getattr(error, "strerror", None) or str(error),
            do="pass the folder that save_pretrained or `equipoise export` wrote",
        ) from None
    return settings


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, one or several, in fp32. Raises DataError."""
    from safetensors.torch import load_file

    with weight_files(Path(folder)) as paths:
        found = {key: value for path in paths for key, value in load_file(path).items()}
    return {key: value.float() for key, value in found.items()}


@contextmanager
def weight_files(folder: Path) -> Iterator[list[Path]]:
    """The safetensors files of a folder, one or several. Around their reading: raises DataError for what is missing or
    damaged."""
    from safetensors import SafetensorError

    try:
        names = {WEIGHTS}
        if (folder / INDEX).is_file():
            names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        yield [folder / Path(name).name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise DataError(
            expected=f"weights in {folder / WEIGHTS}",
            got=f"{type(error).__name__}: {error}"[:200],
            do="bring back the file, or convert other formats with save_pretrained",
        ) from None


def write_weights(state: Mapping[str, Tensor], model: ModelConfig, folder: Path) -> None:
    """Writes a state dict of ``LanguageModel`` as its architecture names and splits it, fp32."""
    from safetensors.torch import save_file

    weights = split_experts(to_hugging_face(dict(state), model))
    if model.tie_embeddings:
        weights.pop("lm_head.weight", None)
    single = {key: value.contiguous().clone() for key, value in weights.items()}
    save_file(single, folder / WEIGHTS, metadata={"format": "pt"})


def write_tokenizer(tokenizer: Path, folder: Path, length: int) -> None:
    """A tokenizer of the lab, as ``get_tokenizer`` wrote it, for sequences of at most ``length``.

    The lab's text has one special token, which ends documents; it also begins them and pads batches.
    """
    shutil.copyfile(tokenizer, folder / TOKENIZER)
    marks = dict.fromkeys(("bos_token", "eos_token", "pad_token"), END_OF_TEXT)
    write_json(
        folder / "tokenizer_config.json",
        marks | {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length,
                 "clean_up_tokenization_spaces": False},
    )  # fmt: skip
    write_json(folder / "generation_config.json", {f"{mark}_id": END_ID for mark in marks})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented and sorted, as transformers writes its own."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextmanager
def safetensors_errors(out: Path) -> Iterator[None]:
    """Turns an error of safetensors while it writes ``out`` into an OutputError."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:  # a full disk, for one
        raise OutputError(
            expected=f"to write {out}", got=str(error), do="free disk space, or choose another folder"
        ) from None
