"""Sorting, padding and the moves between tokens and rows, against definitions written as loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.errors import InputError
from equipoise.functional.permute import (
    equal_runs,
    even_sizes,
    gather_sum,
    max_rows,
    pad_rows,
    padded_size,
    permute,
    sort_by_expert,
    unpermute,
)


@st.composite
def routings(draw) -> tuple[Tensor, int]:
    """(expert_ids_TK, E) with any loads: experts without tokens, all tokens on one, the same expert twice, and with or
    without choices that are none."""
    num_experts = draw(st.integers(1, 9))
    tokens, top_k = draw(st.integers(0, 40)), draw(st.integers(1, 8))
    largest = num_experts - 1 + draw(st.booleans())
    ids = draw(st.lists(st.integers(0, largest), min_size=tokens * top_k, max_size=tokens * top_k))
    return torch.tensor(ids, dtype=torch.int64).view(tokens, top_k), num_experts


@given(routings())
@settings(deadline=None)
def test_pairs_stand_by_expert_then_by_number(routing):
    ids_TK, num_experts = routing
    order = sort_by_expert(ids_TK, num_experts)
    pairs = sorted(range(ids_TK.numel()), key=lambda pair: (ids_TK.flatten()[pair].item(), pair))
    assert order.order_N.tolist() == pairs
    assert order.rows_TK.shape == ids_TK.shape
    assert [pairs[row] for row in order.rows_TK.flatten().tolist()] == list(range(ids_TK.numel()))
    assert order.counts_E.tolist() == [int((ids_TK == e).sum()) for e in range(num_experts)]
    assert order.offsets[0] == 0
    assert order.offsets[-1] == int((ids_TK < num_experts).sum())


@given(routings(), st.booleans(), st.sampled_from([0, 3, 50]))
@settings(deadline=None)
def test_every_row_of_an_expert_is_its_own(routing, pad, call):
    ids_TK, num_experts = routing
    rows = pad_rows(ids_TK, num_experts, pad=pad, call=call)
    ids_N, none_TK = ids_TK.flatten(), ids_TK == num_experts
    counts = torch.bincount(ids_N, minlength=num_experts)[:num_experts].tolist()
    assert rows.counts_E.tolist() == counts
    assert rows.drops == bool(none_TK.any())
    assert rows.sizes_E.tolist() == even_sizes([padded_size(n) if pad else n for n in counts], call)
    assert len(rows.pairs_R) == max_rows(ids_TK.numel(), num_experts, pad=pad, call=call)
    pair_R = torch.full_like(rows.pairs_R, -1)
    pair_R[rows.rows_TK[~none_TK]] = torch.arange(ids_TK.numel())[ids_N < num_experts]
    real_R = pair_R >= 0  # each pair has one row that is not padding, the row it was told
    assert real_R.sum() == sum(counts)
    assert torch.equal(rows.pairs_R[real_R], pair_R[real_R])
    expert_R = torch.arange(num_experts).repeat_interleave(rows.sizes_E)
    own_R = rows.counts_E[expert_R] > 0  # an expert without pairs may have rows, all of them padding
    assert torch.equal(ids_N[rows.pairs_R[: len(expert_R)][own_R]], expert_R[own_R])
    assert not real_R[: len(expert_R)][~own_R].any()
    assert not real_R[len(expert_R) :].any()
    if none_TK.any():
        assert len(expert_R) < len(real_R)  # the last row is idle: it can be zero
        assert (rows.rows_TK[none_TK] == len(real_R) - 1).all()


@given(st.integers(0, 10**6))
@settings(deadline=None)
def test_padding_is_small_and_makes_few_shapes(count):
    size = padded_size(count)
    assert count <= size <= count + count // 16
    assert padded_size(size) == size
    octave = 1 << max(0, count.bit_length() - 1)
    assert len({padded_size(n) for n in range(octave, min(2 * octave, octave + 5000))}) <= 17


COUNTS = st.lists(st.integers(0, 300) | st.integers(0, 5000), min_size=1, max_size=50)


@given(COUNTS, st.booleans(), st.integers(0, 100))
@settings(deadline=None)
def test_rows_never_exceed_what_was_announced(counts, pad, call):
    sizes = even_sizes([padded_size(n) if pad else n for n in counts], call)
    assert sum(sizes) <= max_rows(sum(counts), len(counts), pad=pad, call=call)


@given(COUNTS, st.integers(0, 100))
@settings(deadline=None)
def test_evening_out_costs_less_than_the_calls_it_saves(counts, call):
    evened = even_sizes(counts, call)
    runs = list(equal_runs(evened))
    assert [e for first, run in runs for e in range(first, first + run)] == list(range(len(counts)))
    assert all(len(set(evened[first : first + run])) == 1 for first, run in runs)
    assert all(new >= old for new, old in zip(evened, counts, strict=True))
    products = sum(evened[first] > 0 for first, _ in runs)
    assert sum(evened) + call * products <= sum(counts) + call * sum(n > 0 for n in counts)


@given(routings())
@settings(deadline=None)
def test_permute_copies_and_unpermute_adds(routing):
    ids_TK, num_experts = routing
    order = sort_by_expert(ids_TK, num_experts)
    x_TD = torch.randn(len(ids_TK), 3, dtype=torch.float64)
    rows_ND = permute(x_TD, order)
    for t, rows in enumerate(order.rows_TK.tolist()):
        for row in rows:
            assert torch.equal(rows_ND[row], x_TD[t])
    torch.testing.assert_close(unpermute(rows_ND, order), x_TD * ids_TK.shape[1])


@given(routings())
@settings(deadline=None)
def test_each_is_the_other_one_transposed(routing):
    ids_TK, num_experts = routing
    order = sort_by_expert(ids_TK, num_experts)
    x_TD = torch.randn(len(ids_TK), 2, dtype=torch.float64, requires_grad=True)
    rows_ND = torch.randn(ids_TK.numel(), 2, dtype=torch.float64, requires_grad=True)
    left, right = (permute(x_TD, order) * rows_ND).sum(), (x_TD * unpermute(rows_ND, order)).sum()
    torch.testing.assert_close(left, right)
    for a, b in zip(
        torch.autograd.grad(left, (x_TD, rows_ND)), torch.autograd.grad(right, (x_TD, rows_ND)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradients_of_both_orders():
    order = sort_by_expert(torch.tensor([[2, 0], [0, 1], [2, 2]]), 4)
    x_TD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    rows_ND = torch.randn(6, 2, dtype=torch.float64, requires_grad=True)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda x: permute(x, order), x_TD)
        assert check(lambda rows: unpermute(rows, order), rows_ND)


def test_a_sum_in_bf16_is_rounded_once():
    rows_RD = torch.tensor([1.0] + [2**-9] * 7, dtype=torch.bfloat16).unsqueeze(1)  # 1 + 2^-9 is 1 in bf16
    assert gather_sum(rows_RD, torch.arange(8).unsqueeze(0)).item() == torch.tensor(1 + 7 / 512).bfloat16().item() > 1


def test_sorting_can_be_traced():
    ids_TK = torch.tensor([[3, 1], [0, 3]])
    traced = torch.compile(lambda ids: tuple(sort_by_expert(ids, 5)), fullgraph=True, backend="aot_eager")
    for a, b in zip(traced(ids_TK), sort_by_expert(ids_TK, 5), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1])
@pytest.mark.parametrize("other", [0, 4])
def test_an_unknown_expert_is_refused(bad, other):
    with pytest.raises(InputError, match=r"expert ids in 0\.\.3, or 4 for none"):
        pad_rows(torch.tensor([[other, bad]]), 4)
