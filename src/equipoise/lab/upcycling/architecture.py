"""Which mixture-of-experts class of transformers computes what a dense one does, feed-forwards apart.

dense                      becomes     what decides
qwen3                      qwen3_moe   norms of queries and keys, biases of attention, layers left dense
qwen2                      qwen2_moe   biases of queries, keys and values; the class' shared expert gets width 0
llama, mistral             mixtral     no biases; every layer is MoE
llama, mistral, in part    qwen2_moe   the same without its biases, for layers left dense

What the class cannot hold is refused: it would be another model. transformers is imported inside functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError
from ..models.hf_files import read_settings
from ..models.pretrained import quiet_transformers
from ..models.quantised import how_quantised
from .weights import Shape, check_width

__all__ = ["FAMILIES", "Target", "dense_config", "target_of"]

SAME = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act",
        "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "tie_word_embeddings",
        "rope_parameters", "attention_dropout", "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
# Read here, or without a meaning for what a model computes.
READ = {*SAME, "head_dim", "intermediate_size", "attention_bias", "mlp_bias", "layer_types", "sliding_window",
        "use_sliding_window", "max_window_layers", "pretraining_tp", "transformers_version", "architectures", "dtype",
        "torch_dtype", "model_type"}  # fmt: skip
MULTIPLE = 8  # of neurons in an expert: rows of 16 bytes in bf16, which the grouped products of transformers want
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ELSE = "upcycle another model, or write the class that is missing and load these experts into it"


@dataclass(frozen=True)
class Target:
    """The class that a dense model becomes and the content of its config.json, experts and top-K included."""

    model_type: str
    settings: dict[str, Any]

    @property
    def architecture(self) -> str:
        return {"qwen3_moe": "Qwen3Moe", "qwen2_moe": "Qwen2Moe", "mixtral": "Mixtral"}[self.model_type] + "ForCausalLM"

    def with_top_k(self, top_k: int) -> Target:
        return Target(self.model_type, self.settings | {"num_experts_per_tok": top_k})

    def config_json(self) -> str:
        """As transformers writes it. Raises ConfigError for what the class itself refuses."""
        from transformers import AutoConfig

        try:
            made = AutoConfig.for_model(self.model_type, **self.settings)
        except Exception as error:  # each class checks in its own way
            raise ConfigError(
                expected=f"settings that {self.architecture} takes", got=str(error).strip()[:200], do=ELSE
            ) from None
        return made.to_json_string()


def dense_config(folder: Path) -> Any:
    """The configuration of the dense model in a folder, offline and without remote code.

    Raises DataError for a folder without one, ConfigError for a family that no class here fits, or quantised weights.
    """
    settings = read_settings(folder)
    family = settings.get("model_type")
    if family not in FAMILIES:
        experts = any("expert" in name for name in settings)
        raise ConfigError(
            expected=f"a dense model of {', '.join(FAMILIES)}, which a mixture-of-experts class of transformers fits",
            got=f"model_type = {family!r}" + (", which has experts already" if experts else ""),
            do="train it as it is: equipoise compare --model" if experts else ELSE,
        )
    if (how := how_quantised(settings)) is not None:
        raise ConfigError(
            expected="weights that can be copied and summed",
            got=f"weights in {folder} that are quantised with {how}",
            do="name the model from before it was quantised",
        )
    from transformers import AutoConfig

    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # of many kinds: a file that is cut off, a value that its class refuses
        raise DataError(
            expected=f"a configuration that transformers knows in {folder}",
            got=f"{type(error).__name__}: {error}".partition("\n")[0][:200],
            do="update transformers, or save the model again with it",
        ) from None


def target_of(dense: Any, shape: Shape, layers: Sequence[int]) -> Target:
    """What a dense configuration becomes with these layers as MoE. Raises ConfigError, with all reasons, if nothing.

    >>> from transformers import LlamaConfig
    >>> target_of(LlamaConfig(num_hidden_layers=2), Shape(), [0, 1]).architecture
    'MixtralForCausalLM'
    >>> target_of(LlamaConfig(num_hidden_layers=2, mlp_bias=True), Shape(), [0, 1])
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a llama model that MixtralForCausalLM can hold
      got: mlp_bias = True: experts have no biases
      do:  ...
    """
    kept_dense = [i for i in range(dense.num_hidden_layers) if i not in set(layers)]
    if len(kept_dense) == dense.num_hidden_layers:
        raise ConfigError(expected="at least one layer to become MoE", got="none", do="name some with --layers")
    check_width(dense.intermediate_size, shape.granularity, MULTIPLE)
    family = dense.model_type
    to = "qwen3_moe" if family == "qwen3" else "mixtral" if family != "qwen2" and not kept_dense else "qwen2_moe"
    own = SETTINGS[to](dense, dense.intermediate_size // shape.granularity)
    if to == "mixtral":  # which divides the K weights of a token by their sum without being asked
        own |= {"num_local_experts": shape.experts}
    else:
        own |= {"num_experts": shape.experts, "norm_topk_prob": True, "mlp_only_layers": kept_dense,
                "decoder_sparse_step": 1}  # fmt: skip
    target = Target(to, _common(dense, shape) | own)
    if reasons := list(_lost(dense, target)):
        raise ConfigError(
            expected=f"a {family} model that {target.architecture} can hold", got="; ".join(reasons), do=ELSE
        )
    return Target(to, target.settings | {"architectures": [target.architecture]})


def _common(dense: Any, shape: Shape) -> dict[str, Any]:
    same = {name: getattr(dense, name) for name in SAME}
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    return same | {"head_dim": head_dim, "num_experts_per_tok": shape.top_k, "dtype": getattr(dense, "dtype", None)}


def _as_qwen3_moe(dense: Any, width: int) -> dict[str, Any]:
    """One window for all layers, or none: the class knows no other."""
    window = dense.sliding_window if _windowed(dense) else None
    return {"intermediate_size": dense.intermediate_size, "moe_intermediate_size": width,
            "attention_bias": dense.attention_bias, "use_sliding_window": window is not None,
            "sliding_window": window}  # fmt: skip


def _as_qwen2_moe(dense: Any, width: int) -> dict[str, Any]:
    """A shared expert of width 0 adds nothing. Each layer has its own kind of attention, as Qwen2's have."""
    windowed = _windowed(dense)
    kinds = ["sliding_attention" if i in windowed else "full_attention" for i in range(dense.num_hidden_layers)]
    return {"intermediate_size": dense.intermediate_size, "moe_intermediate_size": width,
            "shared_expert_intermediate_size": 0, "qkv_bias": dense.model_type == "qwen2",
            "use_sliding_window": bool(windowed), "sliding_window": dense.sliding_window if windowed else None,
            "layer_types": kinds}  # fmt: skip


def _as_mixtral(dense: Any, width: int) -> dict[str, Any]:
    return {"intermediate_size": width, "sliding_window": getattr(dense, "sliding_window", None)}


SETTINGS: dict[str, Callable[[Any, int], dict[str, Any]]] = {
    "qwen3_moe": _as_qwen3_moe,
    "qwen2_moe": _as_qwen2_moe,
    "mixtral": _as_mixtral,
}


def _windowed(dense: Any) -> list[int]:
    """The layers whose attention has a window."""
    layers = range(dense.num_hidden_layers)
    if getattr(dense, "sliding_window", None) is None:
        return []
    if dense.model_type == "mistral":
        return list(layers)
    kinds = getattr(dense, "layer_types", None) or []
    return [i for i in layers if i < len(kinds) and kinds[i] == "sliding_attention"]


def _lost(dense: Any, target: Target) -> Iterator[str]:
    """What of the dense model the class would leave out."""
    if getattr(dense, "mlp_bias", False):
        yield "mlp_bias = True: experts have no biases"
    if getattr(dense, "attention_bias", False) and target.model_type != "qwen3_moe":
        yield f"attention_bias = True: {target.architecture} has none at the output of attention"
    if target.model_type == "qwen3_moe" and len(_windowed(dense)) not in (0, dense.num_hidden_layers):
        yield f"a window in layers {', '.join(map(str, _windowed(dense)))} alone: {target.architecture} has one for all"
    from transformers import PreTrainedConfig

    usual = PreTrainedConfig().to_dict().keys()
    for name, value in dense.to_diff_dict().items():
        if name not in READ and name not in usual and value is not None:
            yield f"{name} = {value!r}, which this version does not know"
