"""Experts whose weights are alike are found, however a model stores its experts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.inspection import Request, inspect
from equipoise.inspection.expert_similarity import SAMPLE, weight_similarity
from integrations.hf._cases import quiet


def test_expert_weights_are_compared(folder_of, text, tmp_path):
    """Experts 2 and 5 of layer 1 are made one and the same."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with quiet():
        model = AutoModelForCausalLM.from_pretrained(folder_of("qwen3_moe"))
        experts = model.model.layers[1].mlp.experts
        with torch.no_grad():
            for weight in (experts.gate_up_proj, experts.down_proj):
                weight[5] = weight[2]
        model.save_pretrained(tmp_path / "model")
        AutoTokenizer.from_pretrained(folder_of("qwen3_moe")).save_pretrained(tmp_path / "model")
    found = inspect(Request(tmp_path / "model", data=text, tokens=120, length=24, device="cpu"), tmp_path / "out")
    assert [(p.first, p.second) for p in found.layers[1].alike_weights] == [(2, 5)]
    assert found.layers[0].alike_weights == []
    flat = [
        torch.cat([w.detach()[e].reshape(-1).double() for w in (experts.gate_up_proj, experts.down_proj)])
        for e in range(8)
    ]
    for i in range(8):
        for j in range(8):
            want = float(flat[i] @ flat[j] / (flat[i].norm() * flat[j].norm()))
            assert found.arrays.weight_similarity_LEE[1, i, j] == pytest.approx(want, abs=1e-5)


def test_experts_that_lie_one_below_the_other_are_compared(folder_of):
    """DBRX: (E · H, D) matrices."""
    from transformers import AutoModel

    with quiet():
        model = AutoModel.from_pretrained(folder_of("dbrx"))
    name, block = next((n, m) for n, m in model.named_modules() if type(m).__name__ == "DbrxFFN")
    mlp = block.experts.mlp
    experts, rows = mlp.moe_num_experts, mlp.ffn_hidden_size
    with torch.no_grad():
        for weight in (mlp.w1, mlp.v1, mlp.w2):
            weight[rows : 2 * rows] = weight[:rows]  # expert 1 is expert 0
    found = weight_similarity(model, f"{name}.router", experts)
    flat = [torch.cat([w[e * rows : (e + 1) * rows].detach().double().reshape(-1) for w in (mlp.w1, mlp.v1, mlp.w2)])
            for e in range(experts)]  # fmt: skip
    want = [[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat]
    np.testing.assert_allclose(found.numpy(), want, atol=1e-5)
    assert found[0, 1] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("width", [4, SAMPLE])
def test_experts_in_a_list_are_compared_also_on_a_sample(width):
    block = nn.Module()
    block.gate = nn.Linear(2, 3)
    block.experts = nn.ModuleList(nn.Linear(width, 2, bias=False) for _ in range(3))
    with torch.no_grad():
        block.experts[2].weight.copy_(-block.experts[0].weight)
    found = weight_similarity(nn.ModuleDict({"mlp": block}), "mlp.gate", 3)
    flat = [expert.weight.detach().double().reshape(-1) for expert in block.experts]
    want = [[float(a @ b / (a.norm() * b.norm())) for b in flat] for a in flat]
    np.testing.assert_allclose(found.numpy(), want, atol=1e-5 if width == 4 else 0.02)
    assert weight_similarity(nn.ModuleDict({"mlp": block}), "mlp.gate", 4) is None
