"""The balancer's state beside a checkpoint: written whole, read back exactly, in the form it always had."""

from __future__ import annotations

import json

import pytest
import torch

from equipoise.errors import DataError, OutputError
from equipoise.storage.balancer_file import FILE, NAMES, read_state, remove_state, state_file, write_state

safetensors = pytest.importorskip("safetensors.torch")
STATE = {"step": 3, "layers": [{"name": "a.b", "bias": torch.tensor([0.5, -0.5])}, None], "empty": {}}


def test_what_is_written_is_read(tmp_path):
    write_state(STATE, tmp_path / FILE)
    found = read_state(tmp_path / FILE)
    assert torch.equal(found["layers"][0].pop("bias"), torch.tensor([0.5, -0.5]))
    assert found == {"step": 3, "layers": [{"name": "a.b"}, None], "empty": {}}
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def test_a_file_with_numbered_tensors_is_read(tmp_path):
    """As they were written before tensors were named by their path."""
    text = json.dumps({"step": 3, "bias": {"$tensor": "0"}})
    safetensors.save_file({"0": torch.ones(2)}, tmp_path / FILE, metadata={"state": text})
    assert torch.equal(read_state(tmp_path / FILE)["bias"], torch.ones(2))


def test_where_it_is_looked_for(tmp_path):
    assert state_file(tmp_path) is None
    (tmp_path / NAMES[1]).write_text("")
    assert state_file(tmp_path) == tmp_path / NAMES[1]
    (tmp_path / "adapter").mkdir()
    assert state_file(tmp_path / "adapter") is None
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert state_file(tmp_path / "adapter") == tmp_path / NAMES[1]
    remove_state(tmp_path)
    assert state_file(tmp_path) is None


def test_what_is_no_such_file_is_a_data_error(tmp_path):
    write_state(STATE, tmp_path / FILE)
    whole = (tmp_path / FILE).read_bytes()
    for content in (b"", whole[:-3], b"text"):
        (tmp_path / FILE).write_bytes(content)
        with pytest.raises(DataError, match="balancer's state"):
            read_state(tmp_path / FILE)


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="to write"):
        write_state(STATE, tmp_path / "absent" / FILE)
