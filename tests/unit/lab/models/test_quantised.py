"""Folders with quantised weights: run where a CPU can, and what is missing said by its name where not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.cli import main
from equipoise.errors import ConfigError
from equipoise.inspection import Request, inspect
from equipoise.lab.models.hf_export import export_run
from equipoise.lab.models.pretrained import build
from equipoise.lab.models.quantised import how_quantised, unreadable
from equipoise.lab.training.trainer import train
from unit.lab.models._given import folder_of, run_of, tiny
from unit.lab.training.test_trainer import weights

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="the hf extra is not installed")
FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
KINDS: dict[str, dict[str, Any]] = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "compressed-tensors": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "type": "int"}}},
    },
}
PACKAGES = {"gptq": ["optimum", "gptqmodel"], "awq": ["gptqmodel"], "bitsandbytes": ["bitsandbytes"],
            "compressed-tensors": ["compressed-tensors"]}  # fmt: skip


def fp8(whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Blocks of 16 x 16 with a scale each: (as files hold them, what they mean, settings)."""
    stored, meant = {}, {}
    for name, value in whole.items():
        if not (name.endswith("_proj.weight") and "mlp.experts" in name):
            stored[name] = meant[name] = value
            continue
        rows, columns = value.shape
        blocks = value.view(rows // 16, 16, columns // 16, 16)
        scale = blocks.abs().amax((1, 3)) / 448
        small = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        stored |= {name: small.view(rows, columns), f"{name}_scale_inv": scale}
        meant[name] = (small.float() * scale[:, None, :, None]).view(rows, columns)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16],
                "modules_to_not_convert": ["gate", "lm_head", "self_attn"]}  # fmt: skip
    return stored, meant, settings


def mxfp4(whole: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """Four bits an element, two in a byte, the first in the lower half; a power of two for every 32 of a row."""
    stored, meant = {}, {}
    draw = torch.Generator().manual_seed(0)
    for name, value in whole.items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = meant[name] = value
            continue
        experts, into, out = value.shape
        halves = torch.randint(16, (experts, out, into // 32, 16, 2), generator=draw)
        scale = torch.randint(123, 127, (experts, out, into // 32), generator=draw)
        stored |= {f"{name}_blocks": (halves[..., 0] + 16 * halves[..., 1]).to(torch.uint8),
                   f"{name}_scales": scale.to(torch.uint8)}  # fmt: skip
        values = FP4[halves % 8] * (1 - 2 * (halves // 8)) * 2.0 ** (scale[..., None, None] - 127)
        meant[name] = values.reshape(experts, out, into).transpose(1, 2).contiguous()
    return stored, meant, {"quant_method": "mxfp4", "modules_to_not_convert": ["router", "self_attn", "lm_head"]}


@pytest.fixture(scope="module", params=[("qwen3_moe", fp8), ("gpt_oss", mxfp4)], ids=["fp8", "mxfp4"])
def pair(request, tmp_path_factory, corpus_file):
    """(a folder that is quantised, one with the weights that it means)."""
    from safetensors.torch import load_file, save_file

    family, quantise = request.param
    root = tmp_path_factory.mktemp(family)
    plain = folder_of(tiny(family), root / "plain", corpus_file)
    mark = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (plain / "tokenizer_config.json").write_text(json.dumps(mark))
    stored, meant, settings = quantise(load_file(plain / "model.safetensors"))
    shutil.copytree(plain, root / "quantised")
    save_file(meant, plain / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, root / "quantised" / "model.safetensors", metadata={"format": "pt"})
    set_quantised(root / "quantised", settings)
    return root / "quantised", plain


def set_quantised(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))


def test_what_a_cpu_can_read_is_inspected_as_what_it_means(pair, corpus_file, tmp_path):
    given = {"data": corpus_file, "tokens": 320, "length": 32, "device": "cpu", "dtype": "float32"}
    counts = [inspect(Request(folder, **given), tmp_path / folder.name).arrays.counts_DLE for folder in pair]
    np.testing.assert_array_equal(*counts)


def test_and_is_trained_and_exported_as_a_plain_model(pair, corpus_file, tmp_path):
    quantised, plain = (run_of(folder, corpus_file, steps=1) for folder in pair)
    tokens = torch.arange(60).view(2, 30)
    with torch.no_grad():
        model = build(quantised)
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        assert torch.equal(model(tokens), build(plain)(tokens))
    run = train(quantised, tmp_path / "run")
    export_run(run, tmp_path / "out")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert getattr(theirs.config, "quantization_config", None) is None
    state = weights(run)["model"]
    assert all(torch.equal(value, state[f"network.{name}"]) for name, value in theirs.state_dict().items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory, corpus_file):
    return folder_of(tiny("qwen3_moe"), tmp_path_factory.mktemp("kinds") / "model", corpus_file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_package_that_is_missing_is_named(kind, folder, corpus_file, tmp_path, capsys):
    missing = [name for name in PACKAGES[kind] if importlib.util.find_spec(name.replace("-", "_")) is None]
    if not missing:
        pytest.skip("its packages are installed")
    shutil.copytree(folder, tmp_path / "model")
    set_quantised(tmp_path / "model", KINDS[kind])
    command = ["inspect", str(tmp_path / "model"), "--data", str(corpus_file), "--device", "cpu",
               "--out", str(tmp_path / "out")]  # fmt: skip
    code, said = main(command), capsys.readouterr().err
    assert code == 4
    assert f"quantised with {kind}, 4 bits, and no {' and no '.join(missing)} to read them" in said
    assert f"do:  pip install {' '.join(missing)}; or take the model from before" in said
    with pytest.raises(ConfigError, match=f"quantised with {kind}, 4 bits"):
        run_of(tmp_path / "model", corpus_file)


@pytest.mark.parametrize(
    ("settings", "cuda", "said", "do"),
    [
        ({"quant_method": "higgs"}, False, "which transformers reads on a GPU alone", "--device cuda"),
        ({"quant_method": "next_year", "bits": 2}, True, "next_year, 2 bits, which the installed", "before it was"),
        ({"quant_method": "fp8"}, True, "fp8: what it said", "what is said here"),
    ],
)
def test_other_causes(settings, cuda, said, do):
    error = unreadable({"quantization_config": settings}, "weights", "what it said", cuda=cuda)
    assert error is not None
    assert said in error.got and do in error.do and "download" not in str(error)


def test_how_it_is_quantised():
    assert how_quantised({}) is None
    assert how_quantised({"quantization_config": None, "text_config": {"quantization_config": KINDS["awq"]}}) == (
        "awq, 4 bits"
    )
    assert how_quantised({"quantization_config": {"load_in_8bit": True}}) == "bitsandbytes, 8 bits"
