"""Tokens, documents and images of a call are read from its arguments, by name or by position."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise.external.call_arguments import CallArguments, document_starts

IDS = torch.zeros(2, 4, dtype=torch.long)


class Net(nn.Module):
    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None, **more: Any) -> None: ...


def call(*args: Any, outermost: bool = False, module: nn.Module | None = None, **kwargs: Any) -> CallArguments:
    made = CallArguments(module or Net(), outermost=outermost)
    made.record(args, kwargs)
    return made


def test_tokens_are_found_by_name_and_by_position() -> None:
    assert CallArguments.takes_tokens(Net()) and not CallArguments.takes_tokens(nn.Linear(1, 1))
    mask = torch.ones(2, 4)
    for one in (
        call(IDS, mask),
        call(input_ids=IDS, attention_mask=mask),
        call(inputs_embeds=IDS, attention_mask=mask),
    ):
        assert one.shape == (2, 4) and one.num_tokens == 8 and one.rows == 2 and one.mask is mask
    assert call(input_ids=None).num_tokens == -1


def test_a_forward_that_was_replaced_hides_no_names() -> None:
    module = Net()
    module.forward = lambda *args, **kwargs: None  # type: ignore[method-assign]
    mask = torch.ones(2, 4)
    assert call(IDS, mask, module=module).mask is mask


def test_the_first_argument_of_the_model_itself_is_its_tokens() -> None:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> None: ...

    assert call(IDS, module=Plain(), outermost=True).shape == (2, 4)
    assert call(IDS, module=Plain()).shape is None


def test_a_batch_that_is_one_argument_is_opened() -> None:
    class OfBatch(nn.Module):
        def forward(self, batch: dict) -> None: ...

    one = call({"input_ids": IDS, "position_ids": IDS}, module=OfBatch())
    assert one.shape == (2, 4) and one.positions is IDS


@pytest.mark.parametrize(
    ("name", "value", "documents"),
    [
        ("seq_idx", torch.tensor([[0, 0, 1, 1], [5, 5, 5, 6]]), [[0, 0, 1, 1], [4, 4, 4, 5]]),
        ("position_ids", torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]), [[0, 0, 1, 1], [4, 4, 4, 4]]),
        ("cu_seq_lens_q", torch.tensor([0, 3, 8]), [[0, 0, 0, 1], [1, 1, 1, 1]]),
    ],
)
def test_documents_of_packed_rows_are_numbered(name: str, value: Tensor, documents: list) -> None:
    numbers, inside = call(IDS, **{name: value}).documents()
    assert numbers is not None and numbers.tolist() == documents
    assert (inside is None) == (name != "cu_seq_lens_q") and (inside is None or bool(inside.all()))


def test_tokens_behind_the_last_boundary_are_in_no_document() -> None:
    _, inside = call(IDS, cu_seq_lens_q=torch.tensor([0, 3, 6])).documents()
    assert inside is not None and inside.tolist() == [[True] * 4, [True, True, False, False]]


def test_where_nothing_is_told_there_are_no_documents() -> None:
    assert call(IDS).documents() == (None, None)
    assert document_starts(torch.arange(4)[None]).tolist() == [[True, False, False, False]]
