"""What is found out before a block is relied on: whether it uses the weights and ids of its router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.law import _external
from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias
from equipoise.external.discovery import find_external_routers


class Router(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 8))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_TE = x_TD @ self.weight.T
        weights_TK, ids_TK = logits_TE.softmax(dim=-1).topk(2, dim=-1)
        return logits_TE, weights_TK, ids_TK


class Block(nn.Module):
    """``takes``: what it does with the weights and ids of its router."""

    def __init__(self, takes: str) -> None:
        super().__init__()
        self.gate, self.takes = Router(), takes
        self.experts = nn.Parameter(torch.randn(4, 8, 8))

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE, weights_TK, ids_TK = self.gate(x_TD)
        if self.takes in ("own weights", "nothing"):
            weights_TK = logits_TE.softmax(dim=-1).gather(-1, ids_TK)
        if self.takes == "detached weights":
            weights_TK = weights_TK.detach()
        if self.takes in ("own ids", "nothing"):
            ids_TK = logits_TE.topk(2, dim=-1).indices
        return x_TD + (torch.einsum("td,tkdh->tkh", x_TD, self.experts[ids_TK]) * weights_TK.unsqueeze(-1)).sum(dim=1)


class Model(nn.Module):
    def __init__(self, takes: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Block(takes) for _ in range(2)])

    def forward(self, x_TD: Tensor) -> Tensor:
        for layer in self.layers:
            x_TD = layer(x_TD)
        return x_TD


EXAMPLE = {"x_TD": torch.randn(6, 8, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize("takes", ["own weights", "detached weights", "nothing"])
def test_a_block_that_ignores_the_weights_is_refused(takes: str) -> None:
    """The balance gradient would never begin: nothing flows back through what the router returned."""
    with pytest.raises(ConfigError, match=r"(?s)Router \(layers\.0\.gate\): its block ignores the weights"):
        Balancer(Model(takes), [AuxLoss("micro_batch", 0.1)], example=EXAMPLE)


def test_a_block_that_ignores_the_ids_gets_no_bias_of_ours() -> None:
    """A loss is fine there: the block chooses as the router did. With a bias the router would choose for nobody."""
    Balancer(Model("own ids"), [AuxLoss("micro_batch", 0.1)], example=EXAMPLE).remove()
    with pytest.raises(ConfigError, match="ignores the expert ids"):
        Balancer(Model("own ids"), [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)


@torch.no_grad()
def upcycled(model: nn.Module) -> nn.Module:
    """All experts of a layer are copies of its first one, as in a model made of a dense one."""
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.copy_(parameter[:1].expand_as(parameter))
    return model


def test_a_block_that_ignores_ids_is_refused_also_where_experts_are_copies() -> None:
    with pytest.raises(ConfigError, match="chooses by itself and ignores the expert ids"):
        Balancer(upcycled(Model("own ids")), [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)
    Balancer(upcycled(Model("all")), [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)


def test_copies_in_integers_are_refused_without_a_guess() -> None:
    """Their signs cannot be turned, so nothing tells them from a block that ignores ids."""

    class Eighth(Block):
        def __init__(self) -> None:
            super().__init__("all")
            self.register_buffer("packed", (8 * self.experts.data[:1]).round().to(torch.int8).expand(4, 8, 8).clone())
            del self.experts

        @property
        def experts(self) -> Tensor:
            return self.packed / 8

    model = Model("all")
    model.layers = nn.ModuleList([Eighth() for _ in range(2)])
    with pytest.raises(ConfigError, match="copies of each other or its block ignores the ids, and weights that are"):
        Balancer(model, [ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)
    Balancer(model, [AuxLoss("micro_batch", 0.1)], example=EXAMPLE)


def test_experts_that_give_nothing_yet_are_no_reason_to_refuse() -> None:
    """Where experts begin at 0, the output is the same with any weights and ids."""
    model = Model("all")
    for layer in model.layers:
        layer.experts.data.zero_()
    Balancer(model, [AuxLoss("micro_batch", 0.1), ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)


def test_a_block_that_uses_both_is_pushed() -> None:
    model = Model("all")
    Balancer(model, [AuxLoss("micro_batch", 0.1), ExpertBias("proportional", rate=1e-3)], example=EXAMPLE)
    plain = Model("all")
    balancer = Balancer(plain, [AuxLoss("micro_batch", 0.5)], example=EXAMPLE)
    (balancer.tap(plain(**EXAMPLE).mean()) * 0).backward()  # what is left has the scale 0 as well
    assert all(not layer.gate.weight.grad.any() for layer in plain.layers)
    balancer.discard()
    plain.zero_grad()
    balancer.tap(plain(**EXAMPLE).mean() * 0).backward()  # the loss is 0, its scale is 1: only the balance pushes
    assert all(layer.gate.weight.grad.any() for layer in plain.layers)


class Two(nn.Module):
    """Experts for text and for images, of which a text reaches the first only."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = Block("all"), Block("all")

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.text(x_TD)


def test_routers_that_the_example_does_not_reach_are_found_by_their_class() -> None:
    found = find_external_routers(Two(), EXAMPLE)
    assert [name for name, _ in found] == ["text.gate", "image.gate"]
    assert all((router.num_experts, router.top_k, router.gate) == (4, 2, "softmax") for _, router in found)


def test_what_only_looks_asks_for_choices_and_nothing_more() -> None:
    """A block that ignores weights cannot be balanced; what it chooses can be seen."""
    ((_, first), *_) = find_external_routers(Model("nothing"), EXAMPLE, look=True)
    assert first.gate == "softmax"
    assert find_external_routers(nn.Sequential(nn.Linear(2, 2)), {"input": torch.ones(1, 2)}) == []


def test_a_gate_that_is_not_known_is_warned_of_where_nothing_is_pushed() -> None:
    class Scaled(_external.Gate):
        def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
            return z, weights * (1 + ids), ids

    model = _external.Chain(_external.Block(Scaled()))
    example = {"x": torch.randn(2, 16, _external.D)}
    with pytest.raises(ConfigError, match="follow from none"):
        find_external_routers(model, example)
    with pytest.warns(UserWarning, match=r"Scaled \(blocks\.0\.router\) follow from is not known"):
        Balancer(model, [], example=example)
