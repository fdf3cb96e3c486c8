"""A model that a configuration names: its own config.json if it is on this machine, else what was published of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from .diagnosis import Model
from .document import read_mapping
from .families import OWN_CODE, Family, family_of, with_sizes

__all__ = ["PUBLISHED", "find_family"]

# Beginning of a name -> (model_type, experts, experts per token, MoE layers): from the public config.json files.
PUBLISHED = {
    "qwen3-30b-a3b": ("qwen3_moe", 128, 8, 48),
    "qwen3-coder-30b-a3b": ("qwen3_moe", 128, 8, 48),
    "qwen3-235b-a22b": ("qwen3_moe", 128, 8, 94),
    "qwen3-next-80b-a3b": ("qwen3_next", 512, 10, 48),
    "qwen3-vl-30b-a3b": ("qwen3_vl_moe", 128, 8, 48),
    "qwen3-vl-235b-a22b": ("qwen3_vl_moe", 128, 8, 94),
    "qwen3-omni-30b-a3b": ("qwen3_omni_moe", 128, 8, 48),
    "qwen3.5-35b-a3b": ("qwen3_5_moe", 256, 8, 40),
    "qwen1.5-moe-a2.7b": ("qwen2_moe", 60, 4, 24),
    "qwen2-57b-a14b": ("qwen2_moe", 64, 8, 28),
    "mixtral-8x7b": ("mixtral", 8, 2, 32),
    "mixtral-8x22b": ("mixtral", 8, 2, 56),
    "olmoe-1b-7b": ("olmoe", 64, 8, 16),
    "gpt-oss-20b": ("gpt_oss", 32, 4, 24),
    "gpt-oss-120b": ("gpt_oss", 128, 4, 36),
    "phi-3.5-moe": ("phimoe", 16, 2, 32),
    "deepseek-moe-16b": ("deepseek", 64, 6, 27),
    "deepseek-v2-lite": ("deepseek_v2", 64, 6, 26),
    "deepseek-v3": ("deepseek_v3", 256, 8, 58),
    "deepseek-r1": ("deepseek_v3", 256, 8, 58),
    "kimi-k2": ("kimi_k2", 384, 8, 60),
    "glm-4.5-air": ("glm4_moe", 128, 8, 45),
    "minimax-m2": ("minimax_m2", 256, 8, 62),
}
NOT_THOSE = re.compile(r"deepseek-v3\.2|deepseek-r1-distill|minimax-m2\.")  # other types under a name that begins alike


def find_family(name: object, option: str | None, folder: Path) -> tuple[Family | None, str]:
    """The family of the model that a configuration names, and a sentence on where that comes from.

    Args:
        name: as the configuration has it: a folder, or a name on the hub.
        option: the user's ``--model``, which goes first.
        folder: of the configuration, which relative paths may mean.

    None where neither the file nor the name is known. Raises DataError for an ``--model`` that cannot be read.
    """
    if option is not None:
        path = Path(option).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.exists() and (known := _published(option)):
            return known, f"sizes of {option} as published"
        if not path.exists():
            raise DataError(
                expected="a config.json, or a folder with one", got=f"--model {option}", do="check the path"
            )
        return family_of(read_mapping(path), str(name or option)), f"sizes from {path}"
    if not isinstance(name, str) or not name:
        return None, ""
    for path in (Path(name).expanduser(), folder / name):
        if (path / "config.json").is_file():
            return family_of(read_mapping(path / "config.json"), name), f"sizes from {path / 'config.json'}"
    if (cached := _cached(name)) is not None:
        return family_of(cached, name), f"sizes from the config.json of {name} in this machine's cache of the hub"
    known = _published(name)
    return known, f"sizes of {name} as published, without its own config.json" if known else ""


def _published(name: str) -> Family | None:
    short = name.rstrip("/").rpartition("/")[2].lower()
    if NOT_THOSE.match(short):
        return None
    found = max((one for one in PUBLISHED if short.startswith(one)), key=len, default=None)
    if found is None:
        return None
    kind, experts, top_k, layers = PUBLISHED[found]
    config: dict[str, Any] = {"model_type": kind}
    if kind in OWN_CODE:
        config |= {"num_experts": experts}
    try:
        family = family_of(config, name)
    except ConfigError:  # a transformers that is older than the family
        return None
    return with_sizes(family, Model(name, kind, experts, top_k, layers))


def _cached(name: str) -> Mapping[str, Any] | None:
    """The config.json in the hub's cache; nothing is downloaded."""
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", name):
        return None
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    path = try_to_load_from_cache(name, "config.json")
    return read_mapping(Path(path)) if isinstance(path, str) else None
