"""The best K by a sort of the row: against Python's own sort, ties and NaN among them, and under every transform."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from _threads import one_thread  # noqa: F401
from equipoise.functional import route, top_k_ids
from equipoise.functional import top_k as top_k_module
from equipoise.functional.top_k import BLOCK, NUMBERS, VECTORS, _by_sort, _sorts


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31), experts=st.integers(1, 40), values=st.integers(1, 60), apart=st.sampled_from([1, 1e-7]),
    double=st.booleans(),
)  # fmt: skip
def test_no_other_expert_is_better(seed, experts, values, apart, double):
    """Of few distinct values, so that many are equal, or of values that only their last bits tell apart, both signs:
    the K values are the best, in order, of K unlike experts."""
    draw = torch.Generator().manual_seed(seed)
    steps_TE = torch.randint(-values // 2, values // 2 + 1, (9, experts), generator=draw)
    z_TE = (steps_TE * apart + (0 if apart == 1 else (-1) ** seed)).to(torch.float64 if double else torch.float32)
    z_TE[torch.rand(9, experts, generator=draw) < 0.1] = -math.inf
    top_k = 1 + seed % experts
    ids_TK = _by_sort(z_TE, top_k)
    assert ids_TK.dtype == torch.int64 and ids_TK.is_contiguous()
    for z_E, ids in zip(z_TE.tolist(), ids_TK.tolist(), strict=True):
        assert len(set(ids)) == top_k
        assert [z_E[e] for e in ids] == sorted(z_E, reverse=True)[:top_k]


@pytest.mark.parametrize("experts", [16, 33, 64, 512])
def test_whole_blocks_of_rows_give_what_topk_gives(experts):
    rows = 2 * BLOCK // experts + 3
    z_TE = torch.randn(rows, experts, generator=torch.Generator().manual_seed(experts))
    z_TE[1] = 1 + torch.arange(experts).flip(0) * 2.0**-23  # alike but for the last bits
    z_TE[2, 1:] = -math.inf
    z_TE[2, 0] = -3e38
    z_TE[-1].abs_()
    for top_k in (2, 8, experts):
        values_TK = z_TE.topk(top_k).values
        assert torch.equal(z_TE.gather(1, _by_sort(z_TE, top_k)), values_TK)
    assert torch.equal(_by_sort(z_TE, 1), z_TE.argmax(-1, keepdim=True))
    assert _by_sort(z_TE, 2)[1].tolist() == [0, 1] and _by_sort(z_TE, 2)[2, 0] == 0


def test_rows_whose_best_lie_on_both_sides_of_zero_are_not_sorted_twice(monkeypatch):
    """Keys of unlike signs differ in their first bit, which as a signed number is below every other."""
    again = []
    by_positions = top_k_module._by_positions
    monkeypatch.setattr(top_k_module, "_by_positions", lambda rows, k: again.append(len(rows)) or by_positions(rows, k))
    z_TE = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(_by_sort(z_TE, 12), z_TE.topk(12).indices)
    assert sum(again) < 10


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("nan", [math.nan, -math.nan])
def test_a_nan_counts_as_highest_whatever_its_sign(top_k, nan):
    """0 / 0 makes one with a sign on x86."""
    z_TE = torch.randn(4, 32)
    z_TE[2, 7] = torch.tensor(nan)
    assert torch.signbit(z_TE[2, 7]) == (math.copysign(1, nan) < 0)
    assert _by_sort(z_TE, top_k)[2, 0] == 7


def test_unlike_scores_have_one_answer_whichever_way():
    z_TE = torch.randn(NUMBERS // 16, 16, generator=torch.Generator().manual_seed(0))
    z_TE[5, 3] = math.nan
    assert _sorts(z_TE, 4) == (VECTORS and "AVX" in torch.backends.cpu.get_cpu_capability())
    want_TK = z_TE.topk(4).indices
    assert want_TK[5, 0] == 3 and torch.equal(top_k_ids(z_TE, 4), want_TK) and torch.equal(_by_sort(z_TE, 4), want_TK)
    assert torch.equal(_by_sort(z_TE.T.contiguous().T, 4), want_TK)
    assert torch.equal(torch.vmap(lambda z: _by_sort(z, 4))(z_TE.view(4, -1, 16)), want_TK.view(4, -1, 4))
    assert torch.equal(torch.vmap(lambda z: _by_sort(z, 4), in_dims=1)(z_TE.view(-1, 4, 16)),
                       want_TK.view(-1, 4, 4).movedim(1, 0))  # fmt: skip
    torch.library.opcheck(torch.ops.equipoise.top_k, (z_TE, 4), test_utils=("test_schema", "test_faketensor"))


def test_where_a_sort_would_be_slower_it_is_topk():
    many = torch.randn(NUMBERS // 16, 16)
    torch.set_num_threads(3)
    assert not _sorts(many, 4)
    torch.set_num_threads(1)
    for scores, top_k in [(many[:-1], 4), (many.bfloat16(), 4), (many.to("meta"), 4), (many.T, 4),
                          (torch.rand(NUMBERS, 7), 4), (torch.rand(NUMBERS // 8, 513), 4)]:  # fmt: skip
        assert not _sorts(scores, top_k)
        assert top_k_ids(scores, top_k).shape == (len(scores), top_k)
    for few in (NUMBERS // 8, 2):
        with pytest.raises(RuntimeError, match="out of range"):
            top_k_ids(torch.rand(few, 8), 9)


def test_a_router_of_many_tokens_under_compile_checkpoint_and_gradients():
    z_TE = torch.randn(NUMBERS // 8, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    want_TK = z_TE.detach().topk(2).indices
    by_hand_TK = z_TE.gather(1, want_TK).softmax(dim=-1)
    (slope_TE,) = torch.autograd.grad(by_hand_TK[:, 0].sum(), z_TE)

    def first(z):
        return route(z, 2).weights_TK[:, 0].sum()

    ways = {
        "eager": first,
        "checkpoint": lambda z: checkpoint(first, z, use_reentrant=False),
        "compiled": torch.compile(first, fullgraph=True, backend="aot_eager"),
    }
    for name, way in ways.items():
        (got_TE,) = torch.autograd.grad(way(z_TE), z_TE)
        torch.testing.assert_close(got_TE, slope_TE, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(torch.func.grad(first)(z_TE.detach()), slope_TE)
    torch._dynamo.reset()
