"""How a router's tokens lie is that of the innermost call with as many tokens, or what the user declares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import InputError, TokenLayout
from equipoise.external.batch_context import BatchContext, declared_layout

IDS = torch.zeros(2, 3, dtype=torch.long)
MASK = torch.tensor([[1, 1, 0], [1, 1, 1]])


class Inner(nn.Module):
    def __init__(self, sees: Any) -> None:
        super().__init__()
        self.router, self.sees = nn.Identity(), sees

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **more: Any) -> Tensor:
        self.sees()
        return self.router(input_ids)


class Outer(nn.Module):
    """Inserts one token of an image into each row, and its mask."""

    def __init__(self, sees: Any) -> None:
        super().__init__()
        self.inner = Inner(sees)

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (1, 0), value=1)
        return self.inner(nn.functional.pad(input_ids, (1, 0)), attention_mask=attention_mask)


def placed(model_of: Any, tokens: int, images: Any = None, **call: Any) -> Any:
    found: list[Any] = []
    model = model_of(lambda: found.append(context.place(context.calls_around(name), tokens, images, router=name)))
    name = next(n for n, _ in model.named_modules() if n.endswith("router"))
    context = BatchContext(model, [name])
    model(**call)
    assert not context.runs
    context.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    return found[0]


def test_the_mask_and_rows_of_a_call_are_those_of_its_router() -> None:
    one = placed(Inner, 6, input_ids=IDS, attention_mask=MASK)
    assert one.batch.rows == 2 and one.batch.token_mask_T.tolist() == (MASK > 0).view(-1).tolist() and not one.unread


def test_the_innermost_call_with_as_many_tokens_counts() -> None:
    one = placed(Outer, 8, input_ids=IDS, attention_mask=MASK)
    assert one.batch.token_mask_T.view(2, 4)[:, 1:].tolist() == (MASK > 0).tolist()
    assert placed(Outer, 6, input_ids=IDS, attention_mask=MASK).batch.token_mask_T.view(2, 3).shape == (2, 3)


def test_tokens_that_no_call_has_are_one_sequence_or_unread() -> None:
    one = placed(Inner, 4, input_ids=IDS)
    assert one.batch.num_sequences is None and one.piece == 0 and not one.unread
    with pytest.raises(InputError, match="a mask of 6 tokens"):
        placed(Inner, 4, input_ids=IDS, attention_mask=MASK)


@pytest.mark.parametrize("images", [True, False])
def test_a_router_of_one_modality_gets_its_tokens(images: bool) -> None:
    kinds = torch.tensor([[1, 0, 0], [1, 1, 0]])
    one = placed(Inner, 3, images, input_ids=IDS, attention_mask=MASK, moe_mm_token_type_ids=kinds)
    own = ((kinds != 0) == images).view(-1)
    assert one.rows_T.tolist() == own.nonzero().view(-1).tolist()
    assert one.batch.valid_T.tolist() == (MASK > 0).view(-1).tolist()
    assert one.batch.token_mask_T.tolist() == (own & (MASK > 0).view(-1)).tolist()


def test_a_declared_layout_goes_first_and_has_to_be_of_use() -> None:
    found: list[Any] = []
    model = Inner(lambda: found.append(context.place(context.calls_around("router"), 6)))
    context = BatchContext(model, ["router"])
    layout = TokenLayout(3, torch.tensor([True] * 5 + [False]))
    with declared_layout([context, context], layout):
        model(IDS, MASK)
    model(IDS, MASK)
    assert found[0].batch.rows == 3 and torch.equal(found[0].batch.token_mask_T, layout.token_mask_T)
    assert found[1].batch.rows == 2 and context.declared is None
    with (
        pytest.raises(InputError, match="none that see 7 tokens"),
        declared_layout([context], TokenLayout(1, torch.ones(7) > 0)),
    ):
        model(IDS)


def test_a_copy_of_a_model_follows_no_context_and_an_error_ends_the_call() -> None:
    calls: list[int] = []

    def sees() -> None:
        calls.append(1)
        if 10 in calls:
            raise ValueError

    model = Inner(sees)
    context = BatchContext(model, ["router"])
    context.before_forward.append(lambda: calls.append(10))
    copy.deepcopy(model)(IDS)
    assert 10 not in calls
    with pytest.raises(ValueError):
        model(IDS)
    assert not context.runs and calls.count(10) == 1


def test_tensors_move_to_a_device_once_a_forward() -> None:
    one = placed(Inner, 6, input_ids=IDS, attention_mask=MASK)
    context = BatchContext(nn.Identity(), [])
    moved = context.on(one, torch.device("meta"))
    assert moved.batch.token_mask_T.is_meta and context.on(one, torch.device("meta")) is moved
    assert context.on(one, torch.device("cpu")) is one
