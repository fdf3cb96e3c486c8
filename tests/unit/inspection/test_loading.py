"""A folder of transformers becomes a model with routers and a tokenizer, or an error says what it lacks."""

from __future__ import annotations

import shutil

import pytest
import torch

from equipoise.errors import ConfigError, DataError
from equipoise.inspection.loading import describe_versions, fingerprint, is_run, open_model, open_tokenizer

CPU = torch.device("cpu")


def test_a_folder_becomes_a_model_in_the_asked_type(folder_of):
    folder = folder_of("qwen3_moe")
    loaded = open_model(folder, CPU, "bfloat16")
    assert (loaded.family, loaded.vocab_size, loaded.dtype, loaded.longest) == ("qwen3_moe", 64, torch.bfloat16, 64)
    assert [one.name for one in loaded.routers] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert not loaded.model.training and loaded.biases is None
    assert not hasattr(loaded.forward(torch.ones(1, 4, dtype=torch.long)), "logits"), "without the output layer"


def test_a_tokenizer_shows_what_it_reads(folder_of):
    tokenizer = open_tokenizer(folder_of("qwen3_moe"))
    ids = tokenizer.encode(["a b", "+"])
    assert [[tokenizer.show(i) for i in row] for row in ids] == [["a", "b"], ["+"]]
    assert tokenizer.begin is None and tokenizer.end == 2


def test_a_fingerprint_is_of_the_files_that_make_the_model(folder_of, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("qwen3_moe"), folder)
    before = fingerprint(folder)
    (folder / "notes.txt").write_text("nothing of the model")
    assert fingerprint(folder) == before and not is_run(folder)
    (folder / "more.safetensors").write_bytes(b"")
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("files", "got"), [([], "an empty folder"), (["adapter_config.json"], "an adapter"), (["a.txt"], "a.txt")]
)
def test_a_folder_without_a_model_is_told_what_it_is(files, got, tmp_path):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(DataError, match=got):
        open_model(tmp_path, CPU)
    with pytest.raises(DataError, match="no tokenizer"):
        open_tokenizer(tmp_path)


def test_the_step_is_what_a_trainer_wrote_beside_the_weights(folder_of, tmp_path):
    folder = tmp_path / "checkpoint-7"
    shutil.copytree(folder_of("qwen3_moe"), folder)
    assert open_model(folder, CPU).step is None
    for state, step in (('{"global_step": 30}', 30), ('{"global_step": true}', None), ("[]", None), ("{", None)):
        (folder / "trainer_state.json").write_text(state)
        assert open_model(folder, CPU).step == step
    with pytest.raises(ConfigError, match="--step of a run"):
        open_model(folder, CPU, step=30)


def test_versions_are_those_that_numbers_depend_on():
    assert {"equipoise", "torch"} <= set(describe_versions())
