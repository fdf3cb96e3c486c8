"""Which routers an inspection finds, and what is said of models in which it finds none."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from equipoise.errors import ConfigError
from equipoise.inspection.routers import find_routers
from integrations.hf._cases import inputs, quiet
from integrations.hf.families import build


@pytest.mark.parametrize(("family", "choices"), [("qwen3_moe", 8), ("longcat_flash", 10), ("dbrx", 4), ("jetmoe", 8)])
def test_what_can_be_chosen_counts_as_an_expert(family, choices):
    """No-op experts too, and routers that cannot be balanced."""
    with quiet():
        model = build(family).eval()
        found = find_routers(model, lambda: model(**inputs()))
    assert {(one.num_experts, one.top_k, one.idle) for one in found} == {(choices, 2, 0)}
    assert all(one.gate == "softmax" and one.gate_fits for one in found)
    assert not any(module._forward_hooks for one in found for module in (one.module,))


def test_a_dense_model_is_said_to_be_one():
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ConfigError, match="dense model"):
        find_routers(model, lambda: model(torch.ones(1, 2)))


def test_a_router_that_cannot_be_read_is_named_with_what_describes_it():
    class MyRouter(nn.Linear): ...

    model = nn.Sequential(MyRouter(2, 2))
    with pytest.raises(ConfigError, match="MyRouter, of which none returns these") as caught:
        find_routers(model, lambda: model(torch.ones(1, 2)))
    assert 'register_router("MyRouter", read=' in caught.value.do and "FORMATS" not in str(caught.value)


def test_a_router_of_unknown_code_has_as_many_experts_as_logits():
    """That it might drop choices adds no expert."""

    class Gate(nn.Linear):
        def forward(self, x):
            z = super().forward(x)
            return z, *z.sigmoid().topk(2)

    model = nn.Sequential(Gate(8, 4))
    (found,) = find_routers(model, lambda: model(torch.randn(16, 8)))
    assert (found.num_experts, found.top_k, found.gate, found.gate_fits) == (4, 2, "sigmoid", True)
