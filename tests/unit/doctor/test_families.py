"""Families of transformers: sizes, loss and bias as the doctor reads them are those of the models themselves."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from typing import Any

import pytest
import torch

from equipoise import ConfigError
from equipoise.doctor import families
from equipoise.doctor.families import ASSUMED_BIAS, ASSUMED_LOSS, ASSUMED_VERSION, family_of
from equipoise.doctor.published import PUBLISHED, find_family
from unit.doctor._configs import MIXTRAL, QWEN3, diagnosed, said

pytest.importorskip("transformers", reason="the hf extra is not installed")

from integrations.hf._cases import inputs
from integrations.hf.families import FAMILIES, REFUSED, build

TEXT = [name for name, family in FAMILIES.items() if family.model.endswith("ForCausalLM")]
UNEVEN: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_hidden_layers": 4, "first_k_dense_replace": 3},
    "qwen3_moe": {"num_hidden_layers": 5, "decoder_sparse_step": 2, "mlp_only_layers": [1]},
    "jamba": {"num_hidden_layers": 4, "expert_layer_period": 2, "expert_layer_offset": 1},
    "llama4": {"num_hidden_layers": 4, "interleave_moe_layer_step": 2},
    "lfm2_moe": {"num_dense_layers": 1},
    "afmoe": {"num_hidden_layers": 3, "num_dense_layers": 1},
    "ernie4_5_moe": {"num_hidden_layers": 4, "moe_layer_start_index": 1, "moe_layer_end_index": 2},
    "glm4_moe": {"num_hidden_layers": 3, "first_k_dense_replace": 1},
}


def config_of(model: Any) -> dict[str, Any]:
    return json.loads(model.config.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_sizes_and_bias_are_those_of_the_model(name):
    from equipoise.external.discovery import find_external_routers

    more = UNEVEN.get(name, {})
    model = build(name, **more)
    family = family_of(config_of(model))
    routers = find_external_routers(model, inputs())
    two_for_one = name.startswith("ernie4_5_vl")  # one for text and one for pictures
    assert family.model.layers == len(routers) // (2 if two_for_one else 1)
    biased = any(part in one for one in model.state_dict() for part in ("correction_bias", "expert_bias", "balancing_"))
    assert bool(family.bias) == biased
    assert family.model.experts == 8 and family.model.top_k in (1, 2)


def loss_of(name: str, coef_name: str, coef: float) -> float:
    model = build(name, **({coef_name: coef} if coef_name else {})).train()
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, 12))
    try:
        return model(input_ids=ids, labels=ids, output_router_logits=True).loss.item()
    except (TypeError, RuntimeError, AttributeError):  # a forward that takes no such flag
        return model(input_ids=ids, labels=ids).loss.item()


@pytest.mark.parametrize("name", [name for name in TEXT if name != "dbrx"])  # whose coefficient lies in ffn_config
def test_a_loss_is_added_where_the_doctor_says_and_nowhere_else(name):
    family = family_of(config_of(build(name)))
    added = loss_of(name, family.coef_name, 1.0) - loss_of(name, family.coef_name, 0.0)
    assert (abs(added) > 0.1) == family.adds_loss


def test_what_is_assumed_without_transformers_is_what_it_does(monkeypatch):
    """The tables of families.py, for every type with experts that the installed version knows."""
    if version("transformers") != ASSUMED_VERSION:
        pytest.skip(f"the tables say what transformers {ASSUMED_VERSION} does, here is {version('transformers')}")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    wrong = {}
    for kind in CONFIG_MAPPING:
        more = {"num_experts": 4} if kind in ("hunyuan_v1_moe", "gemma4_text") else {}
        try:
            read = family_of({"model_type": kind} | more)
        except ConfigError:  # dense, or with a class that needs more than a type
            continue
        known = kind.removesuffix("_text")
        loss = known in ASSUMED_LOSS
        if (read.adds_loss, read.bias) != (loss, ASSUMED_BIAS.get(known, "")):
            wrong[kind] = (read.adds_loss, read.bias)
        if loss:
            assert read.coef == ASSUMED_LOSS[known], kind
    parts = ("qwen3_omni_moe_thinker", "qwen3_omni_moe_talker_text", "dots3_note_vision_encoder")
    assert {kind: facts for kind, facts in wrong.items() if kind not in parts} == {}
    assert set(ASSUMED_LOSS) <= set(CONFIG_MAPPING) and set(ASSUMED_BIAS) <= {*CONFIG_MAPPING, "inkling", "dots1"}


@pytest.fixture
def without(monkeypatch):
    """A machine where transformers is not installed."""
    monkeypatch.setitem(sys.modules, "transformers.models.auto.configuration_auto", None)


def test_without_transformers_it_says_what_it_assumes(without, tmp_path):
    case = diagnosed(tmp_path, MIXTRAL, ".json", micro_batch=4)
    assert "transformers 5.23.0, assumed" in " ".join(case.known_from)
    assert case.losses[0].coef == 0.001 and not case.losses[0].works and "B75" in said(case, "off")
    assert family_of({"model_type": "deepseek_v3", "n_routed_experts": 4, "num_experts_per_tok": 2}).bias


def test_a_type_that_nobody_knows(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'qwen3_moe'"):
        family_of(QWEN3 | {"model_type": "qwen3_mo"})
    with pytest.raises(ConfigError, match="model_type"):
        family_of({"num_experts": 8})
    own = family_of({"model_type": "somebodys", "auto_map": {"AutoConfig": "x.y"}, "num_experts": 8})
    assert own.adds_loss is None


def test_a_dense_model():
    with pytest.raises(ConfigError, match="mixture-of-experts"):
        family_of({"model_type": "llama", "num_hidden_layers": 2})
    with pytest.raises(ConfigError, match="no experts"):
        family_of(QWEN3 | {"num_experts": 0})


def test_a_configuration_that_its_class_does_not_take():
    with pytest.raises(ConfigError, match="Qwen3MoeConfig"):
        family_of(QWEN3 | {"num_hidden_layers": "many"})


def test_published_models_have_the_experts_of_their_family():
    """The names lead to families that exist; where a class's defaults are that very model, sizes agree."""
    for name, (kind, experts, top_k, layers) in PUBLISHED.items():
        family, where = find_family(f"somebody/{name.title()}-Instruct", None, families.Path())
        assert family is not None and "as published" in where
        assert (family.model.experts, family.model.top_k, family.model.layers) == (experts, top_k, layers)
        assert 1 <= top_k < experts and layers > 10 and kind in family.model.type
    for other in ("Qwen/Qwen3-8B", "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "deepseek-ai/DeepSeek-V3.2-Exp"):
        assert find_family(other, None, families.Path())[0] is None


def test_the_presets_of_plan_agree():
    from equipoise.plan.presets import MODELS

    for name in MODELS.keys() & PUBLISHED.keys():
        known = MODELS[name]
        assert PUBLISHED[name][1:] == (known["experts"], known["top_k"], known["layers"])
