"""A model's correction bias is found where models keep it, becomes an fp32 buffer, and survives a cast."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equipoise.errors import ConfigError
from equipoise.external.correction_bias import CorrectionBias, find_correction_bias
from equipoise.torch_internals import fsdp_parameter_lists


@pytest.mark.parametrize("place", ["router", "child", "block", "nowhere"])
@pytest.mark.parametrize("name", ["e_score_correction_bias", "expert_bias", "balancing_biases"])
def test_it_is_on_the_router_a_child_of_it_or_its_block(place: str, name: str) -> None:
    block = nn.Sequential(nn.Sequential(nn.Linear(2, 4)))
    owner = {"router": block[0], "child": block[0][0], "block": block, "nowhere": nn.Module()}[place]
    owner.register_buffer(name, torch.zeros(4))
    found = find_correction_bias(block[0], block)
    assert found == (None if place == "nowhere" else (owner, name))


def owned(kind: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    module, values = nn.Module(), torch.tensor([0.5, 0.25, 0.0, -0.75]).to(dtype)
    if kind == "buffer":
        module.register_buffer("expert_bias", values)
    else:
        module.expert_bias = nn.Parameter(values.view(1, 4), requires_grad=False)
    return module


@pytest.mark.parametrize("kind", ["buffer", "parameter"])
def test_taken_over_it_is_fp32_where_checkpoints_have_it(kind: str) -> None:
    module = owned(kind)
    bias = CorrectionBias(module, "expert_bias", 4, [])
    assert bias.view().dtype == torch.bfloat16, "until it is taken over it stays as it is"
    bias.take_over()
    assert "expert_bias" in module._buffers and list(module.state_dict()) == ["expert_bias"]
    bias.view().add_(1e-3)
    assert module.expert_bias.view(-1).tolist() == pytest.approx([0.501, 0.251, 0.001, -0.749])


def test_a_cast_is_undone_to_the_bit_unless_other_weights_were_loaded() -> None:
    module = owned("buffer", torch.float32)
    bias = CorrectionBias(module, "expert_bias", 4, [])
    bias.take_over()
    bias.view().add_(1e-3)
    exact = bias.view().clone()
    module.to(torch.bfloat16)
    assert module.expert_bias.dtype == torch.bfloat16
    assert torch.equal(bias.view(), exact) and module.expert_bias.dtype == torch.float32
    module.to(torch.bfloat16)
    module.load_state_dict({"expert_bias": torch.ones(4)})
    assert bias.view().tolist() == [1.0] * 4


def test_biases_of_no_op_experts_keep_their_distance_from_the_mean() -> None:
    module = owned("buffer", torch.float32)
    CorrectionBias(module, "expert_bias", 3, []).take_over()
    assert module.expert_bias.tolist() == pytest.approx([0.25, 0.0, -0.25, -1.0])
    assert CorrectionBias(module, "expert_bias", 3, []).view().shape == (3,)


def test_without_fsdp_nothing_is_sharded() -> None:
    assert list(fsdp_parameter_lists(nn.Linear(2, 2))) == []


def test_a_bias_that_zero_3_partitioned_is_refused_before_anything_changes() -> None:
    gate = nn.Linear(4, 8)
    gate.e_score_correction_bias = nn.Parameter(torch.empty(0), requires_grad=False)
    gate.e_score_correction_bias.ds_id = 0  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="train this model with ZeRO 0, 1 or 2"):
        CorrectionBias(gate, "e_score_correction_bias", 8, []).take_over()
    assert "e_score_correction_bias" in gate._parameters
