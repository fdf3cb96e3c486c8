"""An example run leaves no trace: modes, random numbers, buffers, attributes, weights to the bit, gradients, hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contracts.law._external import Block, Chain, D, Gate
from equipoise.external.example_run import (
    ExampleRun,
    RouterCall,
    detached_copy,
    gathers_itself,
    in_mode,
    is_partitioned,
    random_signs,
    run_again,
    run_in_training,
    unwrapped,
)
from equipoise.external.output_formats import parse_output

X = torch.randn(2, 4, D, generator=torch.Generator().manual_seed(0))


def model_of(kind: str = "plain") -> Chain:
    torch.manual_seed(0)
    return Chain(Block(Gate(kind)))


def call_of(model: Chain) -> RouterCall:
    router = model.blocks[0].router
    parsed = parse_output(router, (X,), {}, router(X))
    assert parsed is not None
    return RouterCall(parsed.parts, (X,), {})


def test_a_run_is_in_evaluation_and_repeats_itself() -> None:
    model = model_of("noise hidden").train()
    model.blocks[0].eval()
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    seen: list[bool] = []
    run = ExampleRun(model, {"x": X})
    hooks = {model.blocks[0]: lambda module, args, kwargs, output: seen.append(module.training)}
    first, second = run(hooks), run({}, gradient=True)
    assert seen == [False] and torch.equal(first[0], second[0])
    assert not first[0].requires_grad and second[0].requires_grad
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), random)
    assert not any(m._forward_hooks for m in model.modules())


def test_hooks_and_modes_are_restored_after_an_error() -> None:
    model = model_of().train()
    with pytest.raises(RuntimeError):
        ExampleRun(model, {"x": torch.zeros(2, D + 1)})({model.blocks[0]: lambda *_: None})
    assert model.training and not model.blocks[0]._forward_hooks


def test_flipped_signs_come_back_to_the_bit() -> None:
    model = model_of()
    model.register_buffer("packed", torch.ones(3, 3, dtype=torch.int8))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    router = model.blocks[0].router
    with random_signs([model], without=[router]) as complete:
        assert not complete, "integers have no sign to flip"
        experts = model.blocks[0].experts
        assert torch.equal(experts.abs(), before["blocks.0.experts"].abs())
        assert 0.3 < float((experts != before["blocks.0.experts"]).float().mean()) < 0.7
        assert torch.equal(router.linear.weight, before["blocks.0.router.linear.weight"])
    for name, value in model.state_dict().items():
        assert value.view(torch.uint8).equal(before[name].view(torch.uint8)), name
    with random_signs([model.blocks[0]], without=[]) as complete:
        assert complete


def test_other_parameters_take_part_in_a_repeated_call_only() -> None:
    model = model_of()
    router, weight = model.blocks[0].router, model.blocks[0].router.linear.weight.detach().clone()
    parsed = run_again(router, call_of(model), {"linear.weight": 2 * weight})
    assert parsed is not None
    assert torch.allclose(parsed.parts.logits_TE, 2 * X.flatten(0, 1) @ weight.T, atol=1e-5)
    assert torch.equal(router.linear.weight, weight) and not router._forward_hooks


def test_calls_in_training_draw_other_numbers_and_leave_no_trace() -> None:
    model = model_of("noise shown").eval()
    router, random = model.blocks[0].router, torch.get_rng_state()
    first, second = (parsed.parts.logits_TE for parsed in run_in_training(router, call_of(model), 2))
    assert not torch.equal(first, second)
    again = run_in_training(router, call_of(model), 1)[0]
    assert torch.equal(first, again.parts.logits_TE), "the same seeds each time, on every rank"
    assert not router.training and float(router.calls) == 0 and torch.equal(torch.get_rng_state(), random)


def test_a_mode_is_left_with_everything_as_it_was() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1))
            self.count = 0

        def forward(self) -> None:
            self.count += 1
            self.total += 1
            self.fresh: Any = "new"

    module = Counter().eval()
    total = module.total
    with in_mode(module, training=True):
        module()
        assert module.training and module.count == 1
    assert (module.training, module.count, float(module.total)) == (False, 0, 0.0)
    assert module.total is total and not hasattr(module, "fresh")


def test_wrappers_are_looked_through() -> None:
    inner = nn.Linear(2, 2)
    outer = nn.Module()
    outer.module = inner
    assert unwrapped(outer) == [outer, inner] and unwrapped(inner) == [inner]
    leaf = torch.ones(2, requires_grad=True)
    copied: Tensor = detached_copy(leaf)
    assert copied.data_ptr() != leaf.data_ptr() and not copied.requires_grad and detached_copy(3) == 3


def partitioned() -> nn.Module:
    """As ZeRO-3 leaves a module between its calls: each parameter empty, and marked."""
    gate = nn.Linear(4, 8, bias=False)
    gate.weight.data = torch.empty(0)
    gate.weight.ds_id = 0  # type: ignore[attr-defined]
    return gate


def test_what_zero_3_partitioned_is_left_to_its_hooks() -> None:
    gate = partitioned()
    assert is_partitioned(gate.weight) and gathers_itself(gate)
    assert not gathers_itself(nn.Linear(4, 8))
    with random_signs([gate], without=[]) as complete:
        assert not complete, "nothing was changed, and outputs that are alike say nothing"
