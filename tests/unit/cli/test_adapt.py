"""``equipoise adapt`` on a folder of transformers, on a run, and on what it cannot adapt."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("transformers")

from equipoise import apply_adaptive_top_k
from equipoise.cli import main
from equipoise.storage.adaptive_record import read_adaptive
from equipoise.storage.adaptive_top_k_file import FILE, read_top_k
from integrations.hf._cases import quiet
from integrations.hf.families import build
from unit.inspection._folders import write_text, write_tokenizer


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapt-words") / "words.jsonl"
    write_text(path, documents=12)
    return path


def written(family, folder, **more):
    with quiet():
        build(family, **more).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def small(words):
    return ["--data", str(words), "--tokens", "192", "--length", "24", "--device", "cpu"]


def test_a_folder(words, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    folder = written("qwen3_moe", tmp_path / "model")
    assert main(["adapt", str(folder), *small(words), "--each-layer", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    for part in ("knee", "sensitivity", "measured", "memory", "thresholds: out/adaptive_top_k.json"):
        assert part in said
    found = read_adaptive(tmp_path / "out")
    assert found.facts.family == "qwen3_moe" and [one.top_k for one in found.layers] == [2, 2]
    first, last = found.curve[0], found.curve[-1]
    assert (first.fewer, last.fewer, last.control_fewer) == (0.0, 0.5, 0.5)
    assert first.loss == first.control_loss and last.loss == pytest.approx(last.control_loss)
    assert found.saved == found.curve[found.knee]
    assert found.saved.fewer == pytest.approx(1 - sum(one.used for one in found.layers) / 4)
    assert math.isnan(found.layers[0].predicted) and 0 <= found.layers[1].predicted <= 1
    alone = [one.alone_measured for one in found.layers]
    assert all(math.isfinite(one) for one in alone)
    whole = [row for row in found.caches if row.kept == 0.75]
    assert len(whole) == 4 and all(sum(row.sizes) == 12 for row in whole)
    assert all(row.waits <= row.loads for row in found.caches)
    saved = read_top_k(tmp_path / "out")
    assert {name: one.threshold for name, one in saved.routers.items()} == {
        one.name: one.threshold for one in found.layers
    }
    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert all(apply_adaptive_top_k(model, tmp_path / "out").values())
    page = (tmp_path / "out" / "adaptive.html").read_text()
    assert "<svg" in page and "knee" in page and "src=" not in page
    assert main(["adapt", str(folder), *small(words), "--out", "out"]) == 5, "a result is not written over"
    assert "--overwrite" in capsys.readouterr().err


def test_thresholds_of_ones_own_and_json(words, tmp_path, capsys):
    folder = written("qwen3_moe", tmp_path / "model")
    more = ["--thresholds", "0.001,0.1", "--save", "0.02", "--memory", "none", "--beside", "--json"]
    assert main(["adapt", str(folder), *small(words), *more]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [point["budget"] for point in found["curve"]] == [0.0, 0.001, 0.1] and found["caches"] == []
    assert found["saved"]["budget"] == 0.02 == read_top_k(folder).budget
    assert (folder / FILE).read_bytes() == (tmp_path / "adapted" / "model" / FILE).read_bytes()
    for one in found["layers"]:
        assert one["threshold"] == pytest.approx(math.sqrt(0.02 / one["sensitivity"]))


def test_a_run_and_its_export(tiny, here, capsys):
    from transformers import AutoModelForCausalLM

    more = ["--set=model.layers=2", "--set=model.experts=6"]
    assert main(["train", *tiny, *more, "--strategy", "global", "--out", "run", "--plain"]) == 0
    assert main(["adapt", "run", "--tokens", "128", "--beside", "--save", "0.01"]) == 0
    found = read_adaptive(here / "adapted/run")
    assert found.facts.data == "the run's own held-out text"
    assert [one.name for one in found.layers] == [f"model.layers.{i}.mlp.gate" for i in range(2)]
    assert main(["export", "run", "folder"]) == 0
    with quiet():
        model = AutoModelForCausalLM.from_pretrained("folder").eval()
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        whole = model(ids).logits
        apply_adaptive_top_k(model, "folder")
        dropped = model(ids).logits
    used = {one.name: one.used for one in found.layers}
    assert torch.equal(whole, dropped) == all(one == 2.0 for one in used.values())


@pytest.mark.parametrize(
    ("family", "more", "arguments", "code", "says"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 1}, [], 2, "one expert a token"),
        ("qwen3_moe", {}, ["--thresholds", "0.1,0.01"], 2, "each above the one before"),
        ("qwen3_moe", {}, ["--thresholds", "low"], 2, "numbers"),
        ("qwen3_moe", {}, ["--thresholds", ""], 2, "numbers"),
        ("qwen3_moe", {}, ["--memory", "25,150"], 2, "percent"),
        ("qwen3_moe", {}, ["--tokens", "30"], 4, "two windows"),
        ("longcat_flash", {}, [], 2, "by itself"),
        ("dbrx", {}, [], 2, "weights and expert ids are missing"),
    ],
)
def test_what_cannot_be_adapted(family, more, arguments, code, says, words, tmp_path, capsys):
    folder = written(family, tmp_path / "model", **more)
    assert main(["adapt", str(folder), *small(words), *arguments]) == code
    said = capsys.readouterr().err
    assert says in said and "do:" in said
    assert not (tmp_path / "adapted" / "model" / FILE).exists()


def test_a_dense_model_and_no_text(words, tmp_path, capsys):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, head_dim=16)  # fmt: skip
    with quiet():
        Qwen3ForCausalLM(config).save_pretrained(tmp_path / "dense")
    write_tokenizer(tmp_path / "dense")
    assert main(["adapt", str(tmp_path / "dense"), *small(words)]) == 2
    assert "dense" in capsys.readouterr().err
    folder = written("qwen3_moe", tmp_path / "model")
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    assert main(["adapt", str(folder), *small(empty)]) == 4
    shutil.rmtree(folder)
    assert main(["adapt", str(folder), *small(words)]) == 4
    assert "no such folder" in capsys.readouterr().err
