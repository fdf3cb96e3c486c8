"""The error for a model without routers names what its modules returned, and a remedy that works."""

from __future__ import annotations

import re
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contracts.law._external import Block, Chain, D, E, Gate
from equipoise import AuxLoss, Balancer, ConfigError
from equipoise.external.no_router import no_router

X = torch.randn(2, 16, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
CONTRACT = "returns logits (T, E), weights (T, K) and expert ids (T, K)"


class MoEGate(Gate):
    """DeepSeek's and HiDream's: (ids, weights, aux loss)."""

    def output(self, z: Tensor, weights: Tensor, ids: Tensor) -> Any:
        return ids, weights, None


def refused(model: nn.Module, example: Any) -> ConfigError:
    with pytest.raises(ConfigError, match=re.escape(CONTRACT)) as caught:
        Balancer(model, [AuxLoss("micro_batch", 0.1)], example=example)
    assert "FORMATS" not in str(caught.value)
    return caught.value


class Nano(Block):
    """Everything in the block, as in nanoGPT."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.gate = nn.Linear(D, E, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(dim=-1).topk(2, dim=-1)
        return x + self.mixed(x, weights / weights.sum(dim=-1, keepdim=True), ids)


def test_a_gate_without_logits_is_named_with_what_it_returned() -> None:
    model = Chain(*(Block(MoEGate(), lambda o: (o[1], o[0])) for _ in range(3))).double()
    error = refused(model, {"x": X})
    assert "MoEGate (blocks.0.router and 2 more) returned ids (2, 16, 2), weights (2, 16, 2) and no logits" in error.got
    assert "equipoise.register_router(MoEGate, read=" in error.do
    assert "example" not in str(error)


def test_a_block_that_returns_only_its_output_is_pointed_to_the_five_lines() -> None:
    error = refused(Chain(Nano()).double(), {"x": X})
    assert "blocks.0.gate (Linear) returned (2, 16, 4), and no module returned which experts it chose" in error.got
    assert "docs/own-router.md" in error.do
    assert "example" not in str(error)


def test_a_gate_that_nobody_calls_is_named() -> None:
    class Fused(Nano):
        def forward(self, x: Tensor) -> Tensor:
            weights, ids = F.linear(x, self.gate.weight).softmax(dim=-1).topk(2, dim=-1)
            return x + self.mixed(x, weights, ids)

    error = refused(Chain(Fused()).double(), {"x": X})
    assert "blocks.0.gate (Linear) was not called" in error.got


@pytest.mark.parametrize("whole_class", [False, True])
def test_a_forward_that_was_replaced_is_the_reason(monkeypatch, whole_class: bool) -> None:
    """As kernels and Unsloth do: fast code reads the gate's weight and never calls it. What is advised helps."""

    class Own(Block):
        def __init__(self) -> None:
            super().__init__(Gate())

    def fast(self: Any, x: Tensor) -> Tensor:
        return x + self.mixed(x, *F.linear(x, self.router.linear.weight).softmax(dim=-1).topk(2, dim=-1))

    model = Chain(Own()).double()
    if whole_class:
        fast.__module__ = "sloth.kernels"
        monkeypatch.setattr(Own, "forward", fast, raising=False)
    else:
        model.blocks[0].forward = types.MethodType(fast, model.blocks[0])  # type: ignore[method-assign]
    error = refused(model, {"x": X})
    assert "blocks.0.router (Gate) was not called: the forward of" in error.got
    assert "let the forward of its block call blocks.0.router" in error.do
    if whole_class:
        assert "load the model without sloth, which replaced it" in error.do
        monkeypatch.undo()
    else:
        assert "del model.get_submodule('blocks.0').forward" in error.do
        del model.get_submodule("blocks.0").forward
    Balancer(model, [AuxLoss("micro_batch", 0.1)], example={"x": X})


def test_without_an_example_it_is_asked_for_and_explained() -> None:
    error = refused(Chain(Block(Gate())).double(), None)
    assert "no example=" in error.got
    assert 'example={"x": ...}' in error.do
    Balancer(Chain(Block(Gate())).double(), [AuxLoss("micro_batch", 0.1)], example={"x": X})


def test_a_dense_model_is_no_riddle() -> None:
    error = refused(Chain(nn.Linear(D, D)).double(), {"x": X})
    assert error.got == "Chain without a router"
    assert "equipoise.MoE" in error.do


def test_it_names_the_class_to_register_and_what_its_reader_returns() -> None:
    error = no_router([Chain(Block(MoEGate(), lambda o: (o[1], o[0]))).double()], {"x": X})
    assert error.do.startswith("equipoise.register_router(MoEGate, read=lambda module, args, kwargs, output: (logits,")
