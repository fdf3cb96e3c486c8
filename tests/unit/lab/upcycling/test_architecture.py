"""Every pair of classes: the upcycled model computes what the dense one does; what would be lost is refused by name."""

from __future__ import annotations

import json

import pytest
import torch

from equipoise.errors import ConfigError, DataError
from equipoise.lab.upcycling import Request, Shape, upcycle
from equipoise.lab.upcycling.architecture import dense_config, target_of
from unit.lab.upcycling._dense import EXPRESSIBLE, LAYERS, VOCABULARY, dense_folder, logits_of, settings_of

BECOMES = {"qwen3": "Qwen3MoeForCausalLM", "qwen2": "Qwen2MoeForCausalLM", "llama": "MixtralForCausalLM",
           "mistral": "MixtralForCausalLM"}  # fmt: skip


@pytest.mark.parametrize("name", EXPRESSIBLE)
@pytest.mark.parametrize("shape", [Shape(4, 2, 1), Shape(6, 4, 2)], ids=["copy", "split"])
def test_the_same_logits(name, shape, tmp_path):
    family, more, layers = EXPRESSIBLE[name]
    folder = dense_folder(tmp_path / "dense", family, dtype=torch.float64, **more)
    method = "copy" if shape.granularity == 1 else "split"
    found = upcycle(Request(dense=folder, method=method, shape=shape, layers=layers, noise=0.0), tmp_path / "moe")
    in_part = layers not in ("", "0-2")
    assert found.architecture == ("Qwen2MoeForCausalLM" if in_part and family in ("llama", "mistral")
                                  else BECOMES[family])  # fmt: skip
    ids_BS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    dense, moe = logits_of(folder, ids_BS), logits_of(tmp_path / "moe", ids_BS)
    assert dense.std() > 0.1  # it is not the head alone that speaks
    torch.testing.assert_close(moe, dense, rtol=0, atol=2e-6)


def test_every_part_of_the_dense_model_changes_its_logits(tmp_path):
    """Else the test above could pass with a part left out: windows, biases, scaled positions, the eps of norms."""
    ids_BS = torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    plain = {family: logits_of(dense_folder(tmp_path / family, family, dtype=torch.float64), ids_BS)
             for family in ("qwen3", "qwen2", "llama", "mistral")}  # fmt: skip
    for name in ("qwen3 with one window", "qwen2 with windows, in part", "llama with scaled positions", "mistral"):
        family, more, _ = EXPRESSIBLE[name]
        other = logits_of(dense_folder(tmp_path / name, family, dtype=torch.float64, **more), ids_BS)
        assert (other - plain[family]).abs().max() > 1e-3, name


@pytest.mark.parametrize(
    ("family", "more", "said"),
    [
        ("llama", {"mlp_bias": True}, "experts have no biases"),
        ("llama", {"attention_bias": True}, "none at the output of attention"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, "a window in layers 2"),
    ],
)
def test_what_would_be_lost_is_refused(family, more, said, tmp_path):
    folder = dense_folder(tmp_path / "dense", family, **more)
    with pytest.raises(ConfigError, match=said):
        upcycle(Request(dense=folder), tmp_path / "moe")
    assert not (tmp_path / "moe").exists()


def test_all_reasons_at_once_and_a_setting_from_a_later_version(tmp_path):
    folder = dense_folder(tmp_path / "dense", "llama", mlp_bias=True, attention_bias=True)
    settings = settings_of(folder) | {"attention_sinks": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"mlp_bias = True.*attention_bias = True.*attention_sinks = 4"):
        target_of(dense_config(folder), Shape(), range(LAYERS))


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"model_type": "gemma2"}, ConfigError, "llama, mistral, qwen2, qwen3"),
        ({"model_type": "mixtral", "num_local_experts": 8}, ConfigError, "has experts already"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, ConfigError, "gptq, 4 bits"),
        ({"hidden_size": "wide"}, DataError, "save the model again"),
    ],
)
def test_folders_that_cannot_be_upcycled(change, error, said, tmp_path):
    folder = dense_folder(tmp_path / "dense", "llama")
    (folder / "config.json").write_text(json.dumps(settings_of(folder) | change))
    with pytest.raises(error, match=said):
        dense_config(folder)


def test_no_layer_and_a_width_that_cannot_be_shared_out(tmp_path):
    dense = dense_config(dense_folder(tmp_path / "dense", "qwen3"))
    with pytest.raises(ConfigError, match="at least one layer"):
        target_of(dense, Shape(), [])
    with pytest.raises(ConfigError, match="take one of 1, 2, 4"):
        target_of(dense, Shape(10, 5, 5), [0])
    with pytest.raises(ConfigError, match="a multiple of 8"):  # parts of 4 neurons
        target_of(dense, Shape(8, 8, 8), [0])
