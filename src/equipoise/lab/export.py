"""Which Hugging Face architecture a model of the lab is, and its weights under that one's names. No transformers.

gate      selection bias   shared experts   architecture
softmax   no               none             Qwen3MoeForCausalLM, key for key
sigmoid   yes or no        any              Dots1ForCausalLM: DeepSeek-V3's router with the attention used here
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ConfigError

if TYPE_CHECKING:
    from .config import ModelConfig

__all__ = ["architecture", "from_hugging_face", "hugging_face_config", "to_hugging_face"]

BIAS, HF_BIAS = ".mlp.gate.expert_bias", ".mlp.gate.e_score_correction_bias"
SHARED = ("gate_proj", "up_proj", "down_proj")


def architecture(config: ModelConfig) -> str:
    """The class in transformers that computes the same function.

    Raises ConfigError where there is none: a gate, or a mixture of options, that no published model has.

    >>> from equipoise.lab.config import ModelConfig
    >>> architecture(ModelConfig(gate="softmax"))
    'Qwen3MoeForCausalLM'
    """
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

    >>> from equipoise.lab.config import ModelConfig
    >>> hugging_face_config(ModelConfig(gate="sigmoid"), max_positions=256)["model_type"]
    'dots1'
    """
    name = architecture(config)
    common = {
        "architectures": [name],
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.expert_hidden * config.top_k,  # of dense layers, which there are none of
        "moe_intermediate_size": config.expert_hidden,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads or config.heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": max_positions,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "num_experts_per_tok": config.top_k,
        "norm_topk_prob": config.normalize_weights,
    }
    if name == "Qwen3MoeForCausalLM":
        return common | {"model_type": "qwen3_moe", "num_experts": config.experts, "decoder_sparse_step": 1}
    return common | {
        "model_type": "dots1",
        "n_routed_experts": config.experts,
        "n_shared_experts": config.shared_experts,
        "n_group": config.num_groups,
        "topk_group": config.top_groups,
        "routed_scaling_factor": config.weight_scale,
        "first_k_dense_replace": 0,
        "sliding_window": None,
    }


def to_hugging_face(state: dict[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """A state dict of ``LanguageModel`` with every key that its architecture expects, and no other."""
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
