"""Which Hugging Face architecture a model of the lab is, and its weights under that one's names. No transformers.

gate      selection bias   shared experts   architecture
softmax   no               none             Qwen3MoeForCausalLM, key for key
sigmoid   yes or no        any              Dots1ForCausalLM: DeepSeek-V3's router with the attention used here

DeepseekV3ForCausalLM itself cannot hold the sigmoid models. Its keys come out of a latent vector, and the only norm is
on that vector; here every query and key head is normed by itself, which no choice of its matrices computes.

In memory the experts of a layer are one tensor, in files each has its own: `split_experts`, `join_experts`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...errors import ConfigError
from ..config.schema import ModelConfig

__all__ = ["architecture", "from_hugging_face", "hugging_face_config", "join_experts", "model_config",
           "split_experts", "to_hugging_face"]  # fmt: skip

BIAS, HF_BIAS = ".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"
SHARED = ("gate_proj", "up_proj", "down_proj")
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
SINGLE = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")

# field of ModelConfig -> name in config.json, of both classes and of each
SIZES = {
    "vocab_size": "vocab_size", "width": "hidden_size", "expert_hidden": "moe_intermediate_size",
    "layers": "num_hidden_layers", "heads": "num_attention_heads", "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "norm_eps": "rms_norm_eps", "tie_embeddings": "tie_word_embeddings",
    "top_k": "num_experts_per_tok", "normalize_weights": "norm_topk_prob",
}  # fmt: skip
OF_SIGMOID = {
    "experts": "n_routed_experts", "shared_experts": "n_shared_experts", "num_groups": "n_group",
    "top_groups": "topk_group", "weight_scale": "routed_scaling_factor",
}  # fmt: skip
# What the lab's model computes in one way only; a file that leaves one out means this as well.
FIXED = {
    "hidden_act": ("silu",), "attention_bias": (False,), "attention_dropout": (0, None), "decoder_sparse_step": (1,),
    "mlp_only_layers": ([], None), "use_sliding_window": (False, None), "first_k_dense_replace": (0,),
}  # fmt: skip


def architecture(config: ModelConfig) -> str:
    """The class in transformers that computes the same function.

    Raises ConfigError where there is none: a gate, or a mixture of options, that no published model has.

    >>> from equipoise.lab.config.schema import ModelConfig
    >>> architecture(ModelConfig(gate="softmax"))
    'Qwen3MoeForCausalLM'
    """
    if config.expert_widths or config.top_p:
        raise ConfigError(
            expected="experts of one width, and as many for every token, as the classes in transformers have them",
            got=f"expert_widths={config.expert_widths!r}, top_p={config.top_p:g}",
            do="keep the run: equipoise inspect, resume and report read it; train without these settings to export",
        )
    if config.gate == "sigmoid":
        return "Dots1ForCausalLM"
    plain = not config.selection_bias and not config.shared_experts and config.num_groups == 1
    if config.gate in ("auto", "softmax") and plain and config.weight_scale == 1.0:
        return "Qwen3MoeForCausalLM"
    raise ConfigError(
        expected="a model that a Hugging Face architecture holds: a sigmoid gate, or a softmax gate with nothing else",
        got=f"gate={config.gate}, selection_bias={config.selection_bias}, shared_experts={config.shared_experts}, "
        f"num_groups={config.num_groups}, weight_scale={config.weight_scale}",
        do="train with one of these to export, or load the checkpoint with equipoise",
    )


def hugging_face_config(config: ModelConfig, *, max_positions: int) -> dict[str, Any]:
    """The content of ``config.json`` for this model.

    >>> from equipoise.lab.config.schema import ModelConfig
    >>> hugging_face_config(ModelConfig(gate="sigmoid"), max_positions=256)["model_type"]
    'dots1'
    """
    name = architecture(config)
    common = {theirs: getattr(config, ours) for ours, theirs in SIZES.items()} | {
        "architectures": [name],
        "dtype": "float32",
        "num_key_value_heads": config.kv_heads or config.heads,
        "intermediate_size": config.expert_hidden * config.top_k,  # of dense layers, which there are none of
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
    }
    if name == "Qwen3MoeForCausalLM":
        return common | {"model_type": "qwen3_moe", "num_experts": config.experts, "decoder_sparse_step": 1}
    own = {theirs: getattr(config, ours) for ours, theirs in OF_SIGMOID.items()}
    return common | own | {"model_type": "dots1", "first_k_dense_replace": 0, "sliding_window": None}


def model_config(settings: Mapping[str, Any], folder: str) -> ModelConfig:
    """The inverse of ``hugging_face_config``, for the ``config.json`` of any folder.

    Raises ConfigError, with the reason, for what the lab's model cannot compute: another class, or one of these two
    with dense layers, sliding windows, scaled positions or biases.

    >>> from equipoise.lab.config.schema import ModelConfig
    >>> model_config(hugging_face_config(ModelConfig(gate="softmax"), max_positions=256), "my-model").experts
    8
    >>> model_config({"model_type": "mixtral"}, "my-model")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected a model that the lab's own holds: qwen3_moe or dots1 as it writes them
      got: model_type = 'mixtral'
      do:  leave model.through at auto: transformers computes it
    """
    if reasons := list(_differences(settings)):
        raise ConfigError(
            expected="a model that the lab's own holds: qwen3_moe or dots1 as it writes them",
            got=", ".join(reasons),
            do="leave model.through at auto: transformers computes it",
        )
    sigmoid = settings["model_type"] == "dots1"
    settings = {"head_dim": _head_dim(settings), **settings}
    found = {ours: settings[theirs] for ours, theirs in SIZES.items()}
    found |= {ours: settings[theirs] for ours, theirs in OF_SIGMOID.items()} if sigmoid else {
        "experts": _experts(settings)}  # fmt: skip
    found["norm_eps"], found["shared_experts"] = float(found["norm_eps"]), int(found.get("shared_experts") or 0)
    return ModelConfig(
        **found,
        gate="sigmoid" if sigmoid else "softmax",
        selection_bias=sigmoid,
        rope_theta=float(_rope(settings)["rope_theta"]),
        folder=folder,
        through="lab",
        family=settings["model_type"],
    )


def to_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of ``LanguageModel`` with every key that its architecture expects, and no other.

    A bias that pushed the selection of a softmax gate has no place in the file: ``architecture`` refuses it. Nor has
    one of a class of tokens, whose name is the error's here.
    """
    if of_class := [key for key in state if BIAS in key and "_of_" in key.partition(BIAS)[2]]:
        raise ConfigError(
            expected="one selection bias for all tokens, as every class in transformers has it",
            got=of_class[0],
            do="train without ExpertBias(tokens=) to export; equipoise's own checkpoint keeps such a bias",
        )
    if architecture(config) == "Qwen3MoeForCausalLM":
        return dict(state)
    renamed = {key.replace(BIAS, HF_BIAS): value for key, value in state.items()}
    for layer in range(config.layers):
        place = f"model.layers.{layer}.mlp."
        if place + "gate.e_score_correction_bias" not in renamed:  # a router without bias is one whose bias is zero
            renamed[place + "gate.e_score_correction_bias"] = torch.zeros(config.experts)
        if not config.shared_experts:  # the class always has one: of width 0, which adds nothing
            for name in SHARED:
                shape = (config.width, 0) if name == "down_proj" else (0, config.width)
                renamed[f"{place}shared_experts.{name}.weight"] = torch.zeros(shape)
    return renamed


def from_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of ``to_hugging_face``. Raises ConfigError where a bias would be lost."""
    if architecture(config) == "Qwen3MoeForCausalLM":
        return dict(state)
    renamed = {}
    for key, value in state.items():
        if value.numel() == 0:
            continue
        if key.endswith(HF_BIAS) and not config.selection_bias:
            if bool(value.any()):
                raise ConfigError(expected="selection_bias=True for a checkpoint with a selection bias", got="False",
                                  do="set model.selection_bias")  # fmt: skip
            continue
        renamed[key.replace(HF_BIAS, BIAS)] = value
    return renamed


def split_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each expert's matrices under keys of their own, as every published checkpoint has them.

    >>> sorted(split_experts({"a.mlp.experts.gate_up_proj": torch.ones(1, 4, 3)}))
    ['a.mlp.experts.0.gate_proj.weight', 'a.mlp.experts.0.up_proj.weight']
    """
    single: dict[str, Tensor] = {}
    for key, value in state.items():
        if (match := FUSED.fullmatch(key)) is None:
            single[key] = value
            continue
        names = ("gate_proj", "up_proj") if match[2] == "gate_up_proj" else ("down_proj",)
        for name, part in zip(names, value.chunk(len(names), dim=1), strict=True):
            single |= {f"{match[1]}.{expert}.{name}.weight": matrix for expert, matrix in enumerate(part)}
    return single


def join_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse; what is joined already stays."""
    parts: dict[tuple[str, str], dict[int, Tensor]] = {}
    joined: dict[str, Tensor] = {}
    for key, value in state.items():
        if match := SINGLE.fullmatch(key):
            parts.setdefault((match[1], match[3]), {})[int(match[2])] = value
        else:
            joined[key] = value
    stacked = {key: torch.stack([by[expert] for expert in sorted(by)]) for key, by in parts.items()}
    for (place, name), value in stacked.items():
        if name == "gate_proj" and (place, "up_proj") in stacked:
            joined[f"{place}.gate_up_proj"] = torch.cat([value, stacked[place, "up_proj"]], dim=1)
        elif name == "down_proj":
            joined[f"{place}.down_proj"] = value
    return joined


def _differences(settings: Mapping[str, Any]) -> Iterator[str]:
    """What in a config.json the lab's model does not compute."""
    if (kind := settings.get("model_type")) not in ("qwen3_moe", "dots1"):
        yield f"model_type = {kind!r}"
        return
    needed = {*SIZES.values(), *(OF_SIGMOID.values() if kind == "dots1" else ())} - {"head_dim"}
    yield from (f"no {name}" for name in sorted(needed) if settings.get(name) is None)
    if kind == "qwen3_moe" and _experts(settings) is None:
        yield "no num_experts"
    yield from (
        f"{name} = {settings[name]!r}" for name, same in FIXED.items() if settings.get(name, same[0]) not in same
    )
    rope = _rope(settings)
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"rope_type = {rope.get('rope_type')!r}"
    if "rope_theta" not in rope:
        yield "no rope_theta"
    if kind == "dots1" and "first_k_dense_replace" not in settings:
        yield "no first_k_dense_replace"
    if kind == "dots1" and settings.get("sliding_window") and "sliding_attention" in settings.get("layer_types", ()):
        yield f"sliding_window = {settings['sliding_window']}"
    if "quantization_config" in settings:
        yield "quantized weights"


def _head_dim(settings: Mapping[str, Any]) -> int:
    """Where a file leaves it out, the classes share the width among the heads."""
    return settings["hidden_size"] // settings["num_attention_heads"]


def _experts(settings: Mapping[str, Any]) -> Any:
    return settings.get("num_experts", settings.get("num_local_experts"))  # transformers 5.23 writes the latter


def _rope(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Also of files before transformers 5, which had rope_theta beside rope_scaling."""
    if rope := settings.get("rope_parameters"):
        return dict(rope)
    scaling = settings.get("rope_scaling") or {}
    kind = {"rope_type": scaling.get("rope_type", scaling.get("type", "default"))}
    return kind | ({"rope_theta": settings["rope_theta"]} if "rope_theta" in settings else {})
