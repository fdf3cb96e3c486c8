"""The hook on another library's router: what it counts, what it chooses with a bias of ours, and how it goes again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from contracts.law._external import Block, Chain, D, E, Gate
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias
from equipoise.autograd.protocol import MEMBERS
from equipoise.external.discovery import find_external_routers
from equipoise.external.router import ExternalRouter, attached_routers
from equipoise.functional import PLACES

X = torch.randn(2, 16, D, generator=torch.Generator().manual_seed(0))


def model_of(kind: str = "plain", gate: str = "softmax") -> Chain:
    torch.manual_seed(0)
    return Chain(Block(Gate(kind, gate)))


def router_of(model: Chain) -> ExternalRouter:
    ((_, router),) = find_external_routers(model, {"x": X})
    return router


def test_it_has_what_a_balancer_asks_of_a_router_of_ours() -> None:
    model = model_of(gate="sigmoid").train()
    router = router_of(model)
    assert (router.num_experts, router.top_k, router.gate) == (E, 2, "sigmoid")
    assert router.training and list(router.parameters()) == [model.blocks[0].router.linear.weight]
    normalize, scale, *rest = router.traits
    assert (normalize, scale) == (True, pytest.approx(1.0, abs=1e-5))
    assert rest == [1, True, False, True, "scores", PLACES, True, False, None]
    assert all(hasattr(router, name) for name in MEMBERS) and router.bias_owner == "none"
    assert router.expert_bias is None and router.balance_state is None and attached_routers(model) == []


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_a_bias_of_ours_chooses_and_leaves_the_weights_unbiased(gate: str) -> None:
    model = model_of(gate=gate).eval()
    plain = model(X)
    balancer = Balancer(model, [ExpertBias("proportional", rate=1e-3)], example={"x": X})
    ((name, router),) = attached_routers(model)
    assert name == "blocks.0.router" and router.expert_bias is not None
    assert torch.allclose(model(X), plain, atol=1e-6), "a bias of 0 changes nothing"
    router.expert_bias[1] = 10.0
    taken: list[tuple[Tensor, Tensor, Tensor]] = []
    handle = router.module.register_forward_hook(lambda _module, _args, output: taken.append(output))
    model(X)
    logits, weights, ids = (part.flatten(0, 1) for part in taken[0])
    assert (ids == 1).any(dim=-1).all()
    scores = (logits.softmax(-1) if gate == "softmax" else logits.sigmoid()).gather(-1, ids)
    assert torch.allclose(weights, scores / scores.sum(-1, keepdim=True), atol=1e-6)
    handle.remove()
    balancer.remove()
    assert [found for _, found in attached_routers(model)] == [router], "it goes on choosing with its bias"


def test_a_choice_that_does_not_follow_from_its_logits_gets_no_bias() -> None:
    router = router_of(model_of("noise hidden"))
    with pytest.raises(ConfigError, match="go to experts that its logits do not choose"):
        router.enable_selection_bias()
    assert router.expert_bias is None


def test_dropped_choices_are_no_load() -> None:
    model = model_of("dynamic k").train()
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    balancer.tap(model(X).square().mean()).backward()
    optimizer.step()
    seen: Any = model.blocks[0].router.seen
    ids = seen[2].flatten()
    assert balancer.load()[0].tolist() == torch.bincount(ids[ids >= 0], minlength=E).tolist()
    assert int(balancer.load()[0].sum()) < 2 * 32
    balancer.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
