"""Routers are found and read whoever asks: renamed by FSDP2, with K = E in any order, registered, ours, or balanced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.law._external import Block, Chain, D, E, Gate
from equipoise import AuxLoss, Balancer, register_router
from equipoise.external.observe import capture, find_routers, is_own_router
from equipoise.external.registry import REGISTERED
from equipoise.inspection.routers import find_routers as inspected_routers
from equipoise.layers import MoE

X = torch.randn(2, 16, D, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def registered() -> Any:
    """A test's registrations are undone."""
    before = dict(REGISTERED)
    yield
    REGISTERED.clear()
    REGISTERED.update(before)


def model_of(router: nn.Module, take: Any = lambda out: out[1:]) -> Chain:
    torch.manual_seed(0)
    return Chain(Block(router, take)).eval()


class DbrxRouter(nn.Module):
    """Returns logits only; its block chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(D, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class DbrxBlock(Block):
    top_k = 2

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.router(x).softmax(dim=-1).topk(self.top_k)
        return x + self.mixed(x, weights, ids)


@pytest.mark.parametrize("renamed", [False, True])
def test_a_dynamically_subclassed_router_is_found(renamed: bool) -> None:
    """FSDP2 gives a module a class of its own: the line in FORMATS is that of the class below it."""
    model = Chain(DbrxBlock(DbrxRouter())).eval()
    router = model.blocks[0].router
    if renamed:
        router.__class__ = type("FSDPDbrxRouter", (DbrxRouter,), {})
    for find in (find_routers, inspected_routers):
        (found,) = find(model, lambda: model(X))
        assert (found.name, found.num_experts, found.top_k, found.gate) == ("blocks.0.router", E, 2, "softmax")
    with capture([found]) as seen:
        model(X)
    logits = X.flatten(0, 1) @ router.linear.weight.T
    assert torch.allclose(seen[found.name].logits_TE, logits, atol=1e-6)
    assert torch.equal(seen[found.name].ids_TK, logits.topk(2).indices)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize("first", [True, False])
def test_with_k_equal_to_e_weights_are_not_taken_for_logits(gate: str, first: bool) -> None:
    """The order is found from what follows from what, and kept when the choices are captured."""

    class Dense(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return (z, weights, ids) if first else (weights, z, ids)

    model = model_of(Dense(gate=gate, k=E), lambda o: (o[1] if first else o[0], o[2]))
    (found,) = find_routers(model, lambda: model(X))
    assert (found.gate, found.gate_fits) == (gate, True)
    with capture([found]) as seen:
        model(X)
    logits, _, ids = model.blocks[0].router.seen
    assert torch.equal(seen[found.name].logits_TE, logits.flatten(0, 1))
    assert torch.equal(seen[found.name].ids_TK, ids.flatten(0, 1))


def test_a_registered_router_is_read_with_its_arguments() -> None:
    class Silent(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return ids, weights

    register_router(Silent, lambda module, args, kwargs, output: (module.linear(args[0]), output[1], output[0]))
    model = model_of(Silent(), lambda o: (o[1], o[0]))
    (found,) = find_routers(model, lambda: model(X))
    with capture([found]) as seen:
        model(X)
    assert torch.equal(seen[found.name].logits_TE, model.blocks[0].router.seen[0].flatten(0, 1))


def test_weights_that_follow_from_no_gate_are_said_to() -> None:
    class Scaled(Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return z, weights * (1 + ids), ids

    model = model_of(Scaled())
    (found,) = find_routers(model, lambda: model(X))
    assert (found.gate, found.gate_fits) == ("softmax", False)


def test_what_a_balancer_found_is_not_looked_for_again() -> None:
    model = model_of(Gate(gate="sigmoid"))
    balancer = Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})

    def run() -> None:
        raise AssertionError("there is no need to run it")

    (found,) = find_routers(model, run)
    assert (found.name, found.gate, found.num_experts) == ("blocks.0.router", "sigmoid", E)
    balancer.remove()


def test_routers_of_ours_are_known_by_what_they_have() -> None:
    model = MoE(dim=D, hidden=8, num_experts=E, top_k=2).eval()
    (found,) = find_routers(model, lambda: None)
    with capture([found]) as seen:
        model(X.flatten(0, 1))
    assert seen[found.name].ids_TK.shape == (32, 2) and seen[found.name].logits_TE.shape == (32, E)
    block = nn.Module()
    block.num_experts, block.top_k, block.balance_state = E, 2, None  # type: ignore[assignment]
    block.gate = nn.Linear(D, E)
    assert not is_own_router(block), "a block with a gate inside is no router"


def test_a_dense_model_has_none() -> None:
    model = nn.Sequential(nn.Linear(D, D))
    assert find_routers(model, lambda: model(X)) == []
