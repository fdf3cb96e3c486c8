"""What a router is called below all that may wrap it, and where a folder's biases are looked for."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("safetensors")

from equipoise.adapters.biases import biases_beside, plain_name
from equipoise.errors import DataError
from equipoise.storage.balancer_file import FILE, write_state


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.gate",
        "base_model.model.model.layers.0.mlp.gate.base_layer.base_layer",
        "base_model.model.model.layers.0.mlp.gate.modules_to_save.policy",
        "base_model.model.model.layers.0.mlp.gate.original_module",
        "base_model.model.model.layers.0.mlp.modules_to_save.my_adapter.gate",
        "module._orig_mod.base_model.model.model.layers.0._checkpoint_wrapped_module.mlp.gate.modules_to_save.default",
        "_fsdp_wrapped_module.model.layers.0._orig_mod.mlp.gate",
    ],
)
def test_one_router_has_one_name(name):
    assert plain_name(name) == "model.layers.0.mlp.gate"


def test_an_adapters_folder_is_looked_for_above_and_no_other(tmp_path):
    write_state(
        {"biases": {"base_model.model.gate.modules_to_save.policy": torch.ones(4), "frozen": None}}, tmp_path / FILE
    )
    (tmp_path / "policy").mkdir()
    assert biases_beside(tmp_path / "policy") is None
    (tmp_path / "policy" / "adapter_config.json").write_text("{}")
    for folder in (tmp_path, tmp_path / "policy"):
        found = biases_beside(folder)
        assert found is not None
        assert found[0] == tmp_path / FILE and list(found[1]) == ["gate"] and bool((found[1]["gate"] == 1).all())


def test_a_bias_of_a_class_is_not_left_out_in_silence(tmp_path):
    state = {"layers": {"gate": {"class_biases": {"image": torch.ones(4)}}}, "biases": {"gate": torch.ones(4)}}
    write_state(state, tmp_path / FILE)
    with pytest.raises(DataError, match="one of tokens 'image'") as caught:
        biases_beside(tmp_path)
    assert "ExpertBias(rate=0.0, tokens='image')" in caught.value.do
