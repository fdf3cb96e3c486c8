"""The calls of one router: what a recompute is given, and what it cannot be told."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equipoise import StateError
from equipoise.autograd.routing_calls import RecordedCalls, ReplayedCalls


class Inside(torch.autograd.Function):
    """Runs a function inside a backward, as a recompute does."""

    @staticmethod
    def forward(ctx, x, call):
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.call()
        return grad, None


def in_backward(call) -> None:
    Inside.apply(torch.ones((), requires_grad=True), call).backward()


LIVE_TK = torch.tensor([[0, 1], [1, 2]])


def logits(seed: int) -> Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))


def test_ids_take_two_bytes_unless_there_are_more_experts():
    for experts, dtype in ((32767, torch.int16), (32768, torch.int32)):
        calls = RecordedCalls(experts)
        calls.dispatch(torch.tensor([[experts - 1]]), torch.zeros(1, 1))
        in_backward(lambda calls=calls: calls.dispatch(LIVE_TK, logits(0)))
        assert [ids.dtype for ids in calls.ids] == [dtype] and int(calls.ids[0]) == experts - 1


def test_a_recompute_gets_the_entry_whose_logits_are_nearest():
    recorded = [torch.tensor([[2, 3], [i, 3]]) for i in range(3)]
    calls, found = ReplayedCalls("gate", recorded), {}
    for seed in range(3):
        calls.dispatch(LIVE_TK, logits(seed))
    for seed in (1, 0, 2, 1):  # another kernel rounds otherwise
        near = logits(seed) * (1 + 1e-6)
        in_backward(lambda seed=seed, near=near: found.update({seed: calls.dispatch(LIVE_TK, near).ids_TK}))
        assert torch.equal(found[seed], recorded[seed])
    assert calls.left_over == 0


def test_rows_in_another_order_are_told_apart():
    recorded, z_TE, found = [LIVE_TK, LIVE_TK.flip(0)], logits(0), []
    calls = ReplayedCalls("gate", recorded)
    calls.dispatch(LIVE_TK, z_TE)
    calls.dispatch(LIVE_TK, z_TE.flip(0))
    in_backward(lambda: found.append(calls.dispatch(LIVE_TK, z_TE.flip(0)).ids_TK))
    assert torch.equal(found[0], recorded[1])


def test_forwards_that_cannot_be_told_apart_are_an_error_unless_their_records_agree():
    for other, agrees in ((LIVE_TK, True), (LIVE_TK.flip(0), False)):
        calls = ReplayedCalls("gate", [LIVE_TK, other])
        calls.dispatch(LIVE_TK, logits(0))
        calls.dispatch(LIVE_TK, logits(0))
        if agrees:
            in_backward(lambda calls=calls: calls.dispatch(LIVE_TK, logits(0)))
        else:
            with pytest.raises(StateError, match=r"(?s)told apart.*2 of router 'gate'.*with block of its own"):
                in_backward(lambda calls=calls: calls.dispatch(LIVE_TK, logits(0)))


def test_a_recompute_of_a_forward_before_the_context_is_an_error():
    calls = ReplayedCalls("gate", [LIVE_TK])
    with pytest.raises(StateError, match=r"(?s)a recompute with 2 tokens whose forward came before.*do: "):
        in_backward(lambda: calls.dispatch(LIVE_TK, logits(0)))
