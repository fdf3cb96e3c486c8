"""Padding is read from two-dimensional masks of zeros and ones only, of the call whose tokens are the router's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import InputError
from equipoise.external.call_arguments import CallArguments
from equipoise.external.padding import mask_of_call, mask_of_calls, padding_unknown, router_tokens

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


class Net(nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any = None) -> None: ...


class OfTransformers(Net): ...


OfTransformers.__module__ = "transformers.models.net"


def call(mask: Any = None, ids: Tensor = IDS, module: nn.Module | None = None, name: str = "attention_mask") -> Any:
    made = CallArguments(module or Net(), outermost=False)
    made.record((), {"input_ids": ids, name: mask})
    return made


@pytest.mark.parametrize("mask", [MASK, MASK > 0, torch.cat([torch.ones(2, 4), MASK], dim=1).long()])
def test_zeros_are_padding_also_in_a_mask_that_covers_a_cache(mask: Tensor) -> None:
    found = mask_of_call(call(mask))
    assert found is not None and found.tolist() == (MASK > 0).tolist()


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (None, "attention_mask"),
        (torch.zeros(2, 3), "attention_mask"),  # added to scores: 0 is a real token
        (torch.ones(2, 1, 3, 3).long(), "attention_mask"),
        (torch.ones(2, 2).long(), "attention_mask"),
        (torch.ones(3, 3).long(), "attention_mask"),
        (MASK, "key_padding_mask"),  # in torch, 1 is padding
    ],
)
def test_no_other_mask_is_understood(mask: Any, name: str) -> None:
    assert mask_of_call(call(mask, name=name)) is None
    found, unread = mask_of_calls([call(mask, name=name)])
    assert found is None
    assert ("who sees whom" in unread and name in unread) == (mask is not None)


def test_the_innermost_mask_counts() -> None:
    inner, outer = call(MASK), call(torch.ones_like(MASK))
    found, unread = mask_of_calls([inner, outer])
    assert found is not None and found.tolist() == (MASK > 0).tolist() and not unread


def test_an_outer_mask_is_that_of_the_same_tokens_only() -> None:
    found, _ = mask_of_calls([call(), call(MASK)])
    assert found is not None
    found, unread = mask_of_calls([call(ids=IDS.clone()), call(MASK)])
    assert found is None and "not handed on" in unread


def test_what_transformers_makes_of_a_mask_is_no_news() -> None:
    four = torch.ones(2, 1, 3, 3).long()
    assert mask_of_calls([call(four), call(None, module=OfTransformers())]) == (None, "")
    found, unread = mask_of_calls([call(four), call(None)])
    assert found is None and "(2, 1, 3, 3)" in unread


def test_the_error_names_the_router_and_the_remedies() -> None:
    error = padding_unknown("layers.0.gate", 6, "a mask of 8 tokens")
    assert isinstance(error, InputError)
    assert "'layers.0.gate'" in error.got and "attention_mask (B, S)" in error.do and "balancer.layout" in error.do


def test_tokens_of_a_batch_are_counted_without_padding() -> None:
    assert int(router_tokens({"input_ids": IDS, "attention_mask": MASK})) == 5  # type: ignore[arg-type]
    assert router_tokens({"input_ids": IDS}) == router_tokens({"inputs_embeds": torch.zeros(2, 3, 4)}) == 6
    assert router_tokens({"labels": IDS}) is None and router_tokens(IDS) is None
