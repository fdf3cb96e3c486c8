"""A dense folder in one file or many, and the files of an MoE folder: whole, complete, in the dtype that was given."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import DataError
from equipoise.lab.upcycling.folders import DenseWeights, moe_tensors, read_report, shard_name, write_index, write_shard
from equipoise.lab.upcycling.weights import ExpertWeights
from unit.lab.upcycling._dense import HIDDEN, LAYERS, WIDTH, dense_folder, dense_model


def test_all_tensors_of_shards_each_once(tmp_path):
    folder = dense_folder(tmp_path, "qwen3")
    assert len(list(folder.glob("*.safetensors"))) > 3
    weights, state = DenseWeights(folder), dense_model("qwen3").state_dict()
    found = weights.rest(tied=False)
    for number in range(LAYERS):
        found |= weights.layer(number)
        parts = zip(("gate_proj", "up_proj", "down_proj"), weights.feed_forward(number), strict=True)
        found |= {f"model.layers.{number}.mlp.{part}.weight": weight for part, weight in parts}
    assert found.keys() == state.keys() and all(found[name].equal(state[name]) for name in state)
    assert weights.parameters(tied=False) == sum(one.numel() for one in state.values())
    assert weights.parameters(tied=True) == weights.parameters(tied=False) - state["lm_head.weight"].numel()


def test_files_that_are_missing_or_cut_off(tmp_path):
    folder = dense_folder(tmp_path / "dense", "llama")
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    del known["weight_map"]["model.layers.1.mlp.up_proj.weight"]
    (folder / known["weight_map"]["model.layers.0.mlp.up_proj.weight"]).write_bytes(b"cut off")
    with pytest.raises(DataError, match="SafetensorError"):
        DenseWeights(folder)
    index.unlink()
    with pytest.raises(DataError, match=r"model\.safetensors\n.*No such file"):
        DenseWeights(folder)


def test_a_tensor_that_is_not_there_is_named(tmp_path):
    from safetensors.torch import save_file

    save_file({"model.layers.0.mlp.gate_proj.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(DataError, match=r"model\.layers\.0\.mlp\.up_proj\.weight"):
        DenseWeights(tmp_path).feed_forward(0)


@pytest.mark.parametrize("model_type", ["qwen3_moe", "qwen2_moe", "mixtral"])
def test_the_block_in_its_dtype(model_type):
    experts = ExpertWeights(torch.randn(4, 2 * HIDDEN, WIDTH), torch.randn(4, WIDTH, HIDDEN))
    found = moe_tensors(model_type, 2, experts, torch.randn(4, WIDTH), torch.bfloat16)
    assert {one.dtype for one in found.values()} == {torch.bfloat16}
    assert all(name.startswith("model.layers.2.") for name in found)
    assert len(found) == 1 + 3 * 4 + (4 if model_type == "qwen2_moe" else 0)
    assert sum(one.numel() for name, one in found.items() if "shared" in name) == (WIDTH if "2" in model_type else 0)


def test_shards_their_reports_and_the_index(tmp_path):
    names = [shard_name(number, 2) for number in range(3)]
    assert names[0] == "model-00001-of-00003.safetensors" and names == sorted(names)
    for number, name in enumerate(names):
        write_shard(tmp_path / name, {f"w{number}": torch.zeros(2, 3 + number).T}, {"layer": number, "error": 0.5})
    assert read_report(tmp_path / names[2]) == {"layer": 2, "error": 0.5}
    assert write_index(tmp_path, 2) == 6 + 8 + 10
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {"metadata": {"total_size": 96}, "weight_map": {"w0": names[0], "w1": names[1], "w2": names[2]}}
    assert load_file(tmp_path / names[1])["w1"].shape == (4, 2)
    (tmp_path / names[1]).write_bytes((tmp_path / names[1]).read_bytes()[:40])
    assert read_report(tmp_path / names[1]) is None and read_report(tmp_path / "none") is None
