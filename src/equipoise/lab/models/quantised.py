"""Model folders with quantised weights: how they are quantised, and what to do where they cannot be read.

The cause is found in ``config.json`` and the installed packages: transformers words each kind's error differently.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from ...errors import DataError

__all__ = ["dequantised", "how_quantised", "unreadable"]

# quant_method -> what transformers reads it with: name for pip -> module
NEEDS = {
    "aqlm": {"aqlm[gpu,cpu]": "aqlm"},
    "auto-round": {"auto-round": "auto_round"},
    "awq": {"gptqmodel": "gptqmodel"},
    "bitsandbytes": {"bitsandbytes": "bitsandbytes"},
    "compressed-tensors": {"compressed-tensors": "compressed_tensors"},
    "eetq": {"kernels": "kernels"},
    "fp_quant": {"fp_quant": "fp_quant"},
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "higgs": {"flute-kernel": "flute", "fast_hadamard_transform": "fast_hadamard_transform"},
    "hqq": {"hqq": "hqq"},
    "quanto": {"optimum-quanto": "optimum.quanto"},
    "quark": {"amd-quark": "quark"},
    "sinq": {"sinq": "sinq"},
    "spqr": {"spqr_quant[gpu]": "spqr_quant"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq"},
}
ON_GPU = {"eetq", "fbgemm_fp8", "fp_quant", "higgs", "nvfp4", "spqr", "vptq"}
OPENS = {"fp8", "mxfp4"}  # transformers dequantises these while loading, without further packages
BEFORE = "take the model from before it was quantised"


def how_quantised(settings: Mapping[str, Any]) -> str | None:
    """The method and its bits, or None for plain weights. ``settings`` are those of ``config.json``.

    >>> how_quantised({"quantization_config": {"quant_method": "gptq", "bits": 4}})
    'gptq, 4 bits'
    """
    if (method := _method(settings)) is None:
        return None
    bits = _bits(_config(settings))
    return f"{method}, {bits} bits" if bits else method


def dequantised(config: Any, *, cuda: bool = False) -> bool:
    """Asks transformers for plain weights, in its configuration; False where it makes none of this kind of folder.

    ``cuda``: not on a GPU that computes with what is quantised, which takes the package kernels.
    """
    settings = config.to_dict()
    if _method(settings) not in OPENS or (cuda and _installed("kernels")):
        return False
    at = config if getattr(config, "quantization_config", None) else config.get_text_config()
    at.quantization_config = _config(settings) | {"dequantize": True}
    return True


def unreadable(settings: Mapping[str, Any], expected: str, found: str, *, cuda: bool) -> DataError | None:
    """The error for quantised weights that transformers did not read; None where they are plain.

    Args:
        found: its error, or what is missing.
        cuda: the model was to run on a GPU.
    """
    method, how = _method(settings), how_quantised(settings)
    if method is None:
        return None
    missing = [package for package, module in NEEDS.get(method, {}).items() if not _installed(module)]
    install = f"pip install {' '.join(repr(p) if '[' in p else p for p in missing)}"
    if method in ON_GPU and not cuda:
        got = f"weights quantised with {how}, which transformers reads on a GPU alone"
        do = f"on a machine with a GPU {f'{install}, then ' if missing else ''}--device cuda; or {BEFORE}"
    elif missing:
        got, do = (
            f"weights quantised with {how}, and no {' and no '.join(missing)} to read them",
            f"{install}; or {BEFORE}",
        )
    elif not _known(method):
        got, do = f"weights quantised with {how}, which the installed transformers does not know", BEFORE
    else:
        got, do = f"weights quantised with {how}: {found}", f"{BEFORE}, or see to what is said here"
    return DataError(expected=expected, got=got, do=do)


def _config(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Also of a model whose text part alone is quantised."""
    inner = settings.get("text_config")
    found = settings.get("quantization_config") or (inner or {}).get("quantization_config")
    return dict(found or {})


def _method(settings: Mapping[str, Any]) -> str | None:
    config = _config(settings)
    if any(config.get(name) for name in ("load_in_4bit", "load_in_8bit")):
        return "bitsandbytes"  # also without a quant_method
    method = config.get("quant_method")
    return None if method is None else str(getattr(method, "value", method))


def _bits(config: Mapping[str, Any]) -> int | None:
    for name, bits in (("load_in_4bit", 4), ("load_in_8bit", 8)):
        if config.get(name):
            return bits
    groups = [group.get("weights") or {} for group in (config.get("config_groups") or {}).values()]
    found = [config.get("bits"), *(group.get("num_bits") for group in groups)]
    return next((bits for bits in found if isinstance(bits, int)), None)


def _known(method: str) -> bool:
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    return any(name == method or name.startswith(f"{method}_") for name in AUTO_QUANTIZER_MAPPING)


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of a part, where the whole is not there
        return False
