"""The ids of a router's tokens: those of the innermost call that has as many, in a recompute those of its forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from equipoise import InputError, StateError
from equipoise.external.token_ids import TokenIds

IDS = torch.arange(6).view(2, 3)


class Inner(nn.Module):
    """A router that says which ids it was told."""

    def __init__(self, told: list[list[int]]) -> None:
        super().__init__()
        self.router, self.weight, self.told = nn.Identity(), nn.Parameter(torch.ones(1)), told
        self.ids: Any = None
        self.recompute = False

    def forward(self, input_ids: Tensor | None = None, inputs_embeds: Tensor | None = None) -> Tensor:
        x = inputs_embeds if input_ids is None else input_ids.unsqueeze(-1) * 1.0
        if self.recompute:
            return checkpoint(self._route, x, use_reentrant=False)
        return self._route(x)

    def _route(self, x: Tensor) -> Tensor:
        self.told.append(self.ids.of_call("router", x.shape[0] * x.shape[1]).tolist())
        return self.router(x) * self.weight


class Outer(nn.Module):
    """Embeds by itself, so that only its own call has the ids."""

    def __init__(self, told: list[list[int]]) -> None:
        super().__init__()
        self.inner = Inner(told)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.inner(inputs_embeds=input_ids.unsqueeze(-1) * 1.0)


def inner() -> tuple[Inner, list[list[int]]]:
    told: list[list[int]] = []
    model = Inner(told)
    model.ids = TokenIds(model, ["router"])
    return model, told


def test_ids_by_name_by_place_and_of_the_call_around():
    model, told = inner()
    model(IDS)
    model(input_ids=IDS + 1)
    outer = Outer(told)
    outer.inner.ids = TokenIds(outer, ["inner.router"])
    outer.inner.ids.of_call = lambda _, n, of=outer.inner.ids.of_call: of("inner.router", n)
    outer(IDS + 2)
    assert told == [list(range(at, at + 6)) for at in range(3)]


def test_no_ids_is_an_error_and_a_part_by_itself_too():
    model, _ = inner()
    with pytest.raises(InputError, match="a forward without input_ids"):
        model(inputs_embeds=torch.ones(2, 3, 1))
    with pytest.raises(InputError, match="a part of it"):
        model._route(torch.ones(2, 3, 1))
    model.ids.remove()
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_a_recompute_has_the_ids_of_its_forward():
    model, told = inner()
    model.recompute = True
    for at in (0, 10):  # forward and backward in turn
        loss = model(IDS + at).sum()
        with torch.no_grad():
            model(IDS + 50)
        loss.backward()
    assert told[::3] == told[2::3] == [list(range(6)), list(range(10, 16))]
    del told[:]
    first, second = model(IDS).sum(), model(IDS[:, :2] + 20).sum()  # both before: other numbers of tokens
    (first + second).backward()
    assert sorted(told[2:]) == sorted(told[:2])
    del told[:]
    first, second = model(IDS).sum(), model(IDS.clone()).sum()  # the same ids
    (first + second).backward()
    assert told == [list(range(6))] * 4
    model(IDS + 30).sum().backward()  # a step after it is in no doubt: none of the two is left over
    assert told[-2:] == [list(range(30, 36))] * 2
    with pytest.raises(StateError, match="as one batch"):
        (model(IDS).sum() + model(IDS + 1).sum()).backward()


def test_forwards_that_nobody_recomputes_are_not_kept_for_ever():
    model, _ = inner()
    for at in range(200):
        model(IDS + at)
    assert len(model.ids._forwards) < 70
