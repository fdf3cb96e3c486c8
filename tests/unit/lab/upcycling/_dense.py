"""Tiny random dense models of transformers, whose weights matter, as the folders that users have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from equipoise.lab.data.packing import prepare
from equipoise.lab.models.hf_files import write_tokenizer
from equipoise.lab.models.pretrained import quiet_transformers

VOCABULARY, WIDTH, HIDDEN, LAYERS, POSITIONS = 320, 32, 32, 3, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": HIDDEN, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": POSITIONS, "pad_token_id": None,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
SCALED = {"rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}  # fmt: skip

# Of each class it becomes, dense models with everything that it can hold, layers left dense among them.
EXPRESSIBLE: dict[str, tuple[str, dict[str, Any], str]] = {
    "qwen3": ("qwen3", {"head_dim": 16}, ""),
    "qwen3 with biases, tied, in part": ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}, "0,2"),
    "qwen3 with one window": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, ""),
    "qwen2": ("qwen2", {}, ""),
    "qwen2 with windows, in part": (
        "qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}, "1"
    ),
    "llama": ("llama", {"head_dim": 12, "tie_word_embeddings": True}, ""),
    "llama with scaled positions": ("llama", {"rope_parameters": SCALED, "rms_norm_eps": 1e-3}, ""),
    "llama in part": ("llama", {"rope_parameters": SCALED}, "-1"),
    "mistral": ("mistral", {"sliding_window": 5}, ""),
    "mistral in part": ("mistral", {"sliding_window": 5, "head_dim": 10}, "0-1"),
}  # fmt: skip


def dense_model(family: str, **more: Any) -> Any:
    """A random causal language model; its weights are large enough that every part of it changes the logits."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES | {"head_dim": 8} | more)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3 if parameter.ndim == 1 else 0.15)
    return model


def dense_folder(folder: Path, family: str, corpus: Path | None = None, *, dtype=torch.float32, **more: Any) -> Path:
    """The folder that ``save_pretrained`` writes of it, in shards, with a tokenizer if there is a corpus."""
    with quiet_transformers():
        dense_model(family, **more).to(dtype).save_pretrained(folder, max_shard_size="40KB")
    if corpus is not None:
        write_tokenizer(prepare(corpus, vocab_size=300, sequence_length=32).tokenizer_path, folder, POSITIONS)
    return folder


def logits_of(folder: Path, ids_BS: torch.Tensor, dtype=torch.float64) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    with quiet_transformers(), torch.no_grad():
        model, said = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
        assert not said["missing_keys"] and not said["unexpected_keys"] and not said["mismatched_keys"], said
        if "num_experts_per_tok" in model.config.to_dict():  # grouped products know no float64
            model.set_experts_implementation("eager")
        return model.eval()(input_ids=ids_BS).logits


def settings_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())
