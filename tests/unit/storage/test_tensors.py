"""Nested state is split into tensors and JSON and joined again, also where names collide and memory is shared."""

from __future__ import annotations

import json

import pytest
import torch

from equipoise.storage.tensors import join_tensors, split_tensors


def test_state_comes_back_through_json():
    shared = torch.arange(3.0)
    state = {"a": [shared, {"b": shared[1:], "c": "text"}], "d": (1, None)}
    plain, tensors = split_tensors(state)
    found = join_tensors(json.loads(json.dumps(plain)), tensors)
    assert torch.equal(found["a"][0], shared)
    assert torch.equal(found["a"][1]["b"], shared[1:])
    assert (found["a"][1]["c"], found["d"]) == ("text", [1, None])
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors.values()}) == 2


def test_a_key_with_a_slash_hides_no_other_tensor():
    state = {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}}
    found = join_tensors(*split_tensors(state))
    assert (found["a/b"].item(), found["a"]["b"].item()) == (0.0, 1.0)


def test_a_tensor_that_is_gone_is_a_key_error():
    plain, _ = split_tensors({"a": torch.ones(1)})
    with pytest.raises(KeyError):
        join_tensors(plain, {})
