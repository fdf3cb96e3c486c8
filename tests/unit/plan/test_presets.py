"""Models and GPUs by name against what was published of them."""

from __future__ import annotations

import pytest

from equipoise.plan.cluster import Cluster, describe
from equipoise.plan.presets import GPUS, MODELS

# billions of parameters in all and per token, as published; vocabulary and width of the input embedding
PUBLISHED = {
    "deepseek-v3": (671, 37, 129280),
    "gpt-oss-120b": (116.8, 5.1, 201088),
    "kimi-k2": (1043, 32.6, 163840),
    "mixtral-8x7b": (46.7, 12.9, 32000),
    "olmoe-1b-7b": (6.92, 1.28, 50304),
    "qwen3-30b-a3b": (30.5, 3.3, 151936),
    "qwen3-235b-a22b": (235, 22, 151936),
}


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_changes_the_machine_and_nothing_else(name):
    found, default = vars(describe(None, name)), vars(Cluster())
    assert {key for key in found if found[key] != default[key]} <= {"tflops", "intra_gb_s", "inter_gb_s"}


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"lab"}))
def test_presets_have_the_published_number_of_parameters(name):
    total, active, vocabulary = PUBLISHED[name]
    c = describe(name)
    rest = c.dense_parameters + vocabulary * c.width
    assert c.layers * c.experts * c.expert_parameters + rest == pytest.approx(total * 1e9, rel=0.03)
    per_token = c.layers * c.top_k * c.expert_parameters + c.dense_parameters
    embedded = per_token + vocabulary * c.width  # some count the input embedding, some do not
    assert min(abs(per_token - active * 1e9), abs(embedded - active * 1e9)) < 0.03 * active * 1e9


def test_the_labs_preset_is_the_labs_model():
    from equipoise.lab.config.schema import CompareConfig
    from equipoise.lab.models.transformer import LanguageModel

    c, model = describe("lab"), CompareConfig().model
    assert (c.layers, c.experts, c.top_k, c.width, c.expert_hidden) == (
        model.layers, model.experts, model.top_k, model.width, model.expert_hidden
    )  # fmt: skip
    assert c.attention_width == model.heads * model.head_dim
    assert c.tokens == CompareConfig().data.sequence_length
    apart = ("model.embed_tokens", "experts")
    dense = sum(p.numel() for name, p in LanguageModel(model).named_parameters() if not any(a in name for a in apart))
    assert c.dense_parameters == pytest.approx(dense, rel=0.03)
