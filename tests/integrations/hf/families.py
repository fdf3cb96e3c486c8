"""One tiny random model for every MoE family of the installed transformers, built from its configuration alone."""

from __future__ import annotations

import dataclasses
import functools
from importlib.metadata import version
from typing import Any

import pytest
import torch
from torch import nn

__all__ = ["FAMILIES", "FIRST", "NATIVE", "NOT_BUILT", "NO_BIAS", "OWN", "REFUSED", "SERVED", "SINCE", "TOO_OLD",
           "build"]  # fmt: skip

# Names that mean the same in most configurations; a family takes those that its class knows.
TINY: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "ffn_hidden_size": 32,
    "moe_ffn_hidden_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_top_k": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "moe_layer_start_index": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "o_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 4,
    "mamba_num_heads": 4,
    "mamba_d_head": 16,
    "mamba_head_dim": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "ssm_state_size": 8,
    "mamba_dt_rank": 4,
    "sliding_window": 8,
    "use_mamba_kernels": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "router_jitter_noise": 0.0,
    "tie_word_embeddings": False,
    "norm_topk_prob": True,
    "initializer_range": 0.3,  # logits apart enough that no choice hangs on the last bit
    "mlp_layer_types": ["sparse", "sparse"],
    "moe_hidden_size": 16,
    "unpadded_vocab_size": 64,
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
    "mtp_num_hidden_layers": 0,
    "n_groups": 1,
    "router_hidden_size": 16,
}


class Family:
    """A configuration class, a model class, and what this family wants else than ``TINY``."""

    def __init__(self, folder: str, model: str, config: str = "", **wants: Any) -> None:
        self.folder, self.model, self.wants = folder, model, wants
        self.config = config

    def __call__(self, **more: Any) -> nn.Module:
        modeling = pytest.importorskip(
            f"transformers.models.{self.folder}.modeling_{self.folder}",
            reason=f"this transformers is older than its {self.folder}",
        )
        model_class = getattr(modeling, self.model)
        config_class = getattr(modeling, self.config) if self.config else model_class.config_class
        known = names_of(config_class)
        config = config_class(**{k: v for k, v in TINY.items() if k in known} | self.wants | more)
        config.use_cache = False
        torch.manual_seed(0)
        return model_class._from_config(config) if hasattr(model_class, "_from_config") else model_class(config)


@functools.cache
def names_of(config_class: type) -> frozenset[str]:
    """What a configuration class can be given by name, its aliases left out where the name itself is there."""
    return frozenset(f.name for f in dataclasses.fields(config_class)) | frozenset(
        getattr(config_class, "attribute_map", {})
    )


MLA: dict[str, Any] = {"num_key_value_heads": 4}  # latent attention: as many key heads as heads
LINEAR: dict[str, Any] = {"linear_head_dim": 8, "linear_num_heads": 2}
SWA: dict[str, Any] = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8}

FAMILIES: dict[str, Family] = {
    "afmoe": Family("afmoe", "AfmoeForCausalLM"),
    "aria": Family("aria", "AriaTextForCausalLM"),
    "axk1": Family("axk1", "AXK1ForCausalLM", **MLA),
    "axk2": Family("axk2", "AXK2ForCausalLM", **MLA),
    "bailing_hybrid": Family("bailing_hybrid", "BailingHybridForCausalLM"),
    "beam": Family("beam", "BeamForCausalLM"),
    "cohere2_moe": Family("cohere2_moe", "Cohere2MoeForCausalLM"),
    "dbrx": Family(
        "dbrx",
        "DbrxForCausalLM",
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        ffn_config={"hidden_size": 32, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    "deepseek_ocr2": Family("deepseek_ocr2", "DeepseekOcr2TextModel", num_key_value_heads=4),
    "deepseek_v2": Family("deepseek_v2", "DeepseekV2ForCausalLM", **MLA),
    "deepseek_v3": Family("deepseek_v3", "DeepseekV3ForCausalLM", **MLA),
    "deepseek_v32": Family("deepseek_v32", "DeepseekV32ForCausalLM", **MLA),
    "deepseek_v4": Family("deepseek_v4", "DeepseekV4ForCausalLM", mlp_layer_types=["moe", "moe"]),
    "diffusion_gemma": Family("diffusion_gemma", "DiffusionGemmaEncoderTextModel"),
    "doge": Family("doge", "DogeForCausalLM", is_moe=True, num_experts=16),
    "dots1": Family("dots1", "Dots1ForCausalLM"),
    "dots3_note": Family("dots3_note", "Dots3NoteForCausalLM", **MLA),
    "ernie4_5_moe": Family("ernie4_5_moe", "Ernie4_5_MoeForCausalLM"),
    "ernie4_5_vl_moe": Family(
        "ernie4_5_vl_moe",
        "Ernie4_5_VLMoeTextModel",
        moe_intermediate_size=[16, 16],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    ),
    "exaone_moe": Family("exaone_moe", "ExaoneMoeForCausalLM"),
    "flex_olmo": Family("flex_olmo", "FlexOlmoForCausalLM"),
    "flint": Family("flint", "FlintForCausalLM", mlp_only_layers=[]),
    "gemma4": Family(
        "gemma4",
        "Gemma4ForCausalLM",
        enable_moe_block=True,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=64,
    ),
    "glm4_moe": Family("glm4_moe", "Glm4MoeForCausalLM"),
    "glm4_moe_lite": Family("glm4_moe_lite", "Glm4MoeLiteForCausalLM", **MLA),
    "glm4v_moe": Family(
        "glm4v_moe",
        "Glm4vMoeTextModel",
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 0]},
    ),
    "glm5_next": Family("glm5_next", "Glm5NextTextModel", **MLA, **LINEAR, index_kpool=2, qk_rope_head_dim=0),
    "glm_moe_dsa": Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", **MLA),
    "gpt_oss": Family("gpt_oss", "GptOssForCausalLM"),
    "granitemoe": Family("granitemoe", "GraniteMoeForCausalLM"),
    "granitemoe_swa": Family("granitemoe_swa", "GraniteMoeSWAForCausalLM"),
    "granitemoehybrid": Family("granitemoehybrid", "GraniteMoeHybridForCausalLM"),
    "granitemoeshared": Family("granitemoeshared", "GraniteMoeSharedForCausalLM"),
    "hunyuan_v1_moe": Family("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM"),
    "hy_v3": Family("hy_v3", "HYV3ForCausalLM"),
    "hy_v4": Family("hy_v4", "HYV4ForCausalLM"),
    "inkling": Family("inkling", "InklingForCausalLM", **SWA),
    "inkling2": Family("inkling2", "Inkling2ForCausalLM", **SWA),
    "jamba": Family("jamba", "JambaForCausalLM", expert_layer_period=1, expert_layer_offset=0),
    "jetmoe": Family("jetmoe", "JetMoeForCausalLM"),
    "kimi_linear": Family("kimi_linear", "KimiLinearForCausalLM", **MLA, **LINEAR),
    "kolibri1": Family("kolibri1", "Kolibri1ForCausalLM"),
    "laguna": Family("laguna", "LagunaForCausalLM"),
    "lfm2_moe": Family("lfm2_moe", "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"]),
    "llama4": Family("llama4", "Llama4ForCausalLM", interleave_moe_layer_step=1),
    "longcat_flash": Family("longcat_flash", "LongcatFlashForCausalLM", **MLA, zero_expert_num=2),
    "mellum": Family("mellum", "MellumForCausalLM"),
    "mimo_v2_flash": Family("mimo_v2_flash", "MiMoV2FlashForCausalLM"),
    "minimax": Family("minimax", "MiniMaxForCausalLM"),
    "minimax_m2": Family("minimax_m2", "MiniMaxM2ForCausalLM"),
    "minimax_m3_vl": Family("minimax_m3_vl", "MiniMaxM3VLForCausalLM"),
    "mistral4": Family("mistral4", "Mistral4ForCausalLM", **MLA),
    "mistral_large4": Family("mistral_large4", "MistralLarge4TextModel", **MLA),
    "mixtral": Family("mixtral", "MixtralForCausalLM"),
    "muse_spark": Family("muse_spark", "MuseSparkTextModel"),
    "nemotron_h": Family(
        "nemotron_h",
        "NemotronHForCausalLM",
        layers_block_type=["linear_attention", "moe", "full_attention", "moe"],
        num_hidden_layers=4,
    ),
    "nllb_moe": Family(
        "nllb_moe",
        "NllbMoeForConditionalGeneration",
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_sparse_step=1,
        decoder_sparse_step=1,
    ),
    "olmoe": Family("olmoe", "OlmoeForCausalLM"),
    "openai_privacy_filter": Family("openai_privacy_filter", "OpenAIPrivacyFilterForTokenClassification"),
    "phimoe": Family("phimoe", "PhimoeForCausalLM"),
    "qwen2_moe": Family("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen3_5_moe": Family("qwen3_5_moe", "Qwen3_5MoeForCausalLM"),
    "qwen3_moe": Family("qwen3_moe", "Qwen3MoeForCausalLM"),
    "qwen3_next": Family("qwen3_next", "Qwen3NextForCausalLM"),
    "qwen3_omni_moe": Family("qwen3_omni_moe", "Qwen3OmniMoeThinkerTextModel"),
    "qwen3_vl_moe": Family("qwen3_vl_moe", "Qwen3VLMoeTextModel"),
    "qwen4_exp": Family("qwen4_exp", "Qwen4ExpForCausalLM"),
    "solar_open": Family("solar_open", "SolarOpenForCausalLM"),
    "step3p7": Family("step3p7", "Step3p7TextModel"),
    "switch_transformers": Family(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_heads=4,
        num_sparse_encoder_layers=2,
        num_sparse_decoder_layers=2,
        num_decoder_layers=2,
    ),
    "unlimited_ocr": Family("unlimited_ocr", "UnlimitedOcrTextModel"),
    "zaya": Family("zaya", "ZayaForCausalLM", num_experts_per_tok=1),
}

NOT_BUILT: dict[str, str] = {}  # family -> the error its configuration gives

# family -> the class that equipoise.external.output_formats.FORMATS refuses, with the reason there
REFUSED: dict[str, str] = {
    "dbrx": "DbrxRouter",
    "doge": "DogeCDMoE",
    "jetmoe": "JetMoeTopKGating",
    "nllb_moe": "NllbMoeTop2Router",
    "switch_transformers": "SwitchTransformersTop1Router",
}
# families that bring a correction bias; of the others, those whose weights we could not make for another choice
# fmt: off
NATIVE: list[str] = [
    "afmoe", "axk1", "axk2", "bailing_hybrid", "beam", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1",
    "dots3_note", "ernie4_5_moe", "ernie4_5_vl_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm4v_moe",
    "glm5_next", "glm_moe_dsa", "hy_v3", "hy_v4", "inkling", "inkling2", "kimi_linear", "kolibri1", "laguna",
    "lfm2_moe", "longcat_flash", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "muse_spark", "nemotron_h",
    "solar_open", "step3p7", "zaya",
]
# fmt: on
NO_BIAS: list[str] = ["diffusion_gemma", "gemma4", "phimoe"]
# The first transformers whose model has a router that returns logits, weights and ids; older ones are refused in words.
SINCE: dict[str, tuple[int, int]] = {"aria": (5, 18), "jamba": (5, 21), "longcat_flash": (5, 19)}
_installed = tuple(int(part) for part in version("transformers").split(".")[:2])
TOO_OLD: list[str] = [family for family, since in SINCE.items() if _installed < since]

SERVED: list[str] = [family for family in FAMILIES if family not in {*REFUSED, *NOT_BUILT, *TOO_OLD}]
OWN: list[str] = [family for family in SERVED if family not in NATIVE and family not in NO_BIAS]

# One family of each kind of router, tested in full by `make test`; the others are with -m full. What makes a kind is
# in `_cases.kind_of`, and a test says so where a family is of a kind that is not here.
FIRST: dict[str, str] = {
    "qwen3_moe": "normalized softmax, no bias: the most frequent kind",
    "deepseek_v2": "softmax probabilities of all experts",
    "openai_privacy_filter": "normalized softmax times a constant",
    "flint": "normalized sigmoid, no bias",
    "llama4": "scores of all experts, scattered, and no ids; sigmoid",
    "glm4_moe": "sigmoid, the bias a buffer of the router",
    "deepseek_v3": "the same times a constant",
    "laguna": "sigmoid, the bias a parameter of the router",
    "minimax_m2": "sigmoid, the bias a buffer of the block",
    "hy_v3": "the same times a constant",
    "lfm2_moe": "the same under another name",
    "afmoe": "sigmoid, the bias a parameter of the block",
    "deepseek_v4": "square root of softplus",
    "ernie4_5_moe": "softmax chosen with a bias inside the router",
    "ernie4_5_vl_moe": "the same, one router for text and one for images",
    "gemma4": "probabilities in place of logits, weights with a learned scale",
    "phimoe": "weights that are sampled",
    "inkling": "weights normalized together with shared experts",
    "longcat_flash": "no-op experts that return their token",
    "zaya": "a choice that skips the layer",
}


def build(family: str, **more: Any) -> nn.Module:
    """The family's tiny model on the CPU, the same at every call."""
    model = FAMILIES[family](**more)
    if family == "zaya":  # with -1, as it begins, a tiny model never skips
        for bias in (b for name, b in model.named_buffers() if name.endswith("balancing_biases")):
            bias[-1] = 0.0
    return model
