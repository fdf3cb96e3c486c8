"""Which modules of a run are routers: the innermost that parse, with ids that can be experts; and what is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.law._external import Block, Chain, D, Gate
from equipoise import ConfigError
from equipoise.external.example_run import ExampleRun
from equipoise.external.recognition import dummy_inputs, example_of, first_calls, router_call
from equipoise.external.registry import REGISTERED, register_router

X = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0))


class Wrapper(nn.Module):
    """Returns the router's output as its own, as PEFT's modules do."""

    def __init__(self) -> None:
        super().__init__()
        self.base = Gate()

    def forward(self, x: Tensor) -> Any:
        return self.base(x)


def calls(model: nn.Module) -> Any:
    modules = dict(model.named_modules())
    return first_calls(ExampleRun(model, {"x": X}), modules, router_call)


def test_the_innermost_module_is_the_router_and_its_wrapper_is_known() -> None:
    seen, wrappers = calls(Chain(Block(Wrapper()), Block(Gate())))
    assert list(seen) == ["blocks.0.router.base", "blocks.1.router"]
    assert wrappers == {"blocks.0.router.base": "blocks.0.router", "blocks.1.router": "blocks.1.router"}


def test_only_the_first_call_is_kept_and_a_copy_of_its_arguments() -> None:
    gate = Gate()
    found: list[Any] = []

    def recognize(*call: Any) -> Any:
        found.append(call[0])
        return router_call(*call)

    class Twice(Block):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(super().forward(x))

    model = Chain(Twice(gate))
    seen, _ = first_calls(ExampleRun(model, {"x": X}), dict(model.named_modules()), recognize)
    assert found.count("blocks.0.router") == 1
    assert torch.equal(seen["blocks.0.router"].args[0], X)
    assert seen["blocks.0.router"].args[0].data_ptr() != X.data_ptr()
    assert seen["blocks.0.router"].expressions == ["output[0]", "output[1]", "output[2]"]


@pytest.mark.parametrize(("ids", "is_router"), [([0, 3], True), ([-1, 2], True), ([0, 4], False), ([-2, 1], False)])
def test_integers_have_to_be_experts(ids: list[int], is_router: bool) -> None:
    output = torch.randn(1, 4), torch.rand(1, 2), torch.tensor([ids])
    assert (router_call("name", nn.Identity(), (), {}, output) is not None) == is_router


def test_a_registered_reader_that_fails_is_named() -> None:
    class Mine(nn.Identity): ...

    def read(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        return output[7]

    register_router(Mine, read)
    try:
        with pytest.raises(ConfigError, match=r"IndexError.*for Mine \(layer\.gate\)") as caught:
            router_call("layer.gate", Mine(), (), {}, (1, 2))
        assert "read=" in caught.value.do
    finally:
        del REGISTERED[Mine]


def test_a_model_inside_a_wrapper_knows_its_example() -> None:
    inner, outer = nn.Module(), nn.Module()
    inner.dummy_inputs, outer.module = {"input_ids": torch.zeros(1, 2)}, inner  # type: ignore[assignment]
    assert example_of(outer, None) is inner.dummy_inputs
    assert example_of(outer, {"x": 1}) == {"x": 1}
    assert example_of(nn.Linear(1, 1), None) is None and dummy_inputs(nn.Linear(1, 1)) is None
