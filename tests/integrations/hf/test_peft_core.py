"""PEFT wraps or copies the routers that it trains: both are balanced as they are, and frozen ones stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import LoraConfig, get_peft_model

from equipoise import AuxLoss, Balancer, ExpertBias
from integrations.hf._cases import inputs, loss_of, quiet, rounding, same_gradients
from integrations.hf._law import Twin, bias_of, law, naive_bias_step
from integrations.hf.families import build

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")
LORA = {"r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
KINDS: dict[str, dict[str, Any]] = {
    "LoRA on the gate": {"target_parameters": ["gate.weight"]},
    "a copy of the gate": {"modules_to_save": ["gate"]},
    "LoRA elsewhere": {},
}


def adapted(family: str, kind: str) -> Any:
    """B of LoRA begins at 0, where A gets no gradient: drawn here, the same each time."""
    with quiet():
        model = get_peft_model(build(family), LoraConfig(**LORA, **KINDS[kind]))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=draw))
    return model


def twin_of(family: str, kind: str) -> Twin:
    """Hooks on the routers that run: of a copied gate the original never does."""
    twin = Twin.__new__(Twin)
    twin.model, twin.family, twin.logits, twin.ids = adapted(family, kind), family, {}, {}
    for name, module in twin.model.named_modules():
        if type(module).__name__.lower().endswith("topkrouter") and "original_module" not in name:
            module.register_forward_hook(twin._logits(name))
            block = twin.model.get_submodule(name.partition(".gate")[0])
            block.experts.register_forward_pre_hook(twin._ids(name), with_kwargs=True)
    return twin


def step(model: Any, balancer: Balancer, given: dict[str, Tensor]) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    model.train()
    balancer.tap(loss_of(model, given)).backward()
    optimizer.step()


@pytest.mark.parametrize("kind", list(KINDS)[:2])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "minimax_m2"])
def test_a_router_that_peft_trains_is_pushed_as_the_law_says(family: str, kind: str) -> None:
    model, twin = adapted(family, kind), twin_of(family, kind)
    with quiet():
        policies = [ExpertBias(rate=0.005)] if bias_of(model) else []
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), *policies])
        given = inputs()
        step(model, balancer, given)
        twin.model.train()
        own = loss_of(twin.model, given)
        mask_T = given["attention_mask"].bool().view(-1).tolist()
        (own.double() + law(twin, [t // 6 for t in range(18)], mask_T, 0.3)).backward()
        same_gradients(model, twin.model, rounding(family, given, make=lambda: adapted(family, kind)))
    assert any("gate" in name for name, p in model.named_parameters() if p.grad is not None), "the router is among them"
    counts = list(twin.counts(mask_T).values())
    assert [c.tolist() for c in balancer.load()] == counts, "and it is there once"
    moved = [b for name, b in bias_of(model).items() if b.any()]
    assert len(moved) == (2 if policies else 0)
    for bias_E, count in zip(moved, counts, strict=False):
        assert torch.allclose(bias_E, torch.tensor(naive_bias_step([0.0] * 8, count, 0.005)), atol=1e-7)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_routers_that_peft_leaves_frozen_stay_and_it_says_so(family: str) -> None:
    model, plain = adapted(family, "LoRA elsewhere"), adapted(family, "LoRA elsewhere")
    policies = [ExpertBias(rate=0.005)] if bias_of(model) else []
    with pytest.warns(UserWarning, match="every router of this model is frozen"):
        balancer = Balancer(model, [AuxLoss("sequence", 0.3), *policies])
    step(model, balancer, inputs())
    plain.train()
    loss_of(plain, inputs()).backward()
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), name
    assert not any(b.any() for b in bias_of(model).values())
    assert all(int(c.sum()) == 30 for c in balancer.load()), "loads are measured"
