"""The kernels around the experts' products, against float64: run by test_interpreted.py, or as it is on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise import MoE
from equipoise.functional.permute import sort_by_expert
from equipoise.kernels import INTERPRETED, fused_experts
from equipoise.kernels import experts as kernels
from equipoise.kernels.experts import add_rows, copy_rows, sort_pairs, swiglu, swiglu_gradient
from equipoise.layers.cpu.uneven_experts import uneven_experts
from equipoise.layers.experts import uneven_grouped_experts

DEVICE = "cpu" if INTERPRETED else "cuda"
EXAMPLES = settings(deadline=None, max_examples=10 if INTERPRETED else 200, derandomize=True)
# Of one number: the interpreter (Triton 3.6) cuts bf16 off where a GPU rounds to the nearest.
ROUNDING = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8}


@st.composite
def routings(draw) -> tuple[Tensor, int]:
    """(expert_ids_TK, E) with any loads: even, all pairs on one expert, the same expert twice, more than one block, and
    with or without choices that are none."""
    num_experts, tokens, top_k = draw(st.integers(1, 40)), draw(st.integers(0, 40)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    ids_TK = torch.randint(num_experts, (tokens, top_k), generator=generator)
    if draw(st.booleans()):
        ids_TK.fill_(draw(st.integers(0, num_experts - 1)))
    if draw(st.booleans()):
        ids_TK[torch.rand(ids_TK.shape, generator=generator) < draw(st.sampled_from([0.3, 1.0]))] = num_experts
    return ids_TK.to(DEVICE), num_experts


@given(routings())
@EXAMPLES
def test_counting_gives_the_order_of_a_stable_sort(routing):
    ids_TK, num_experts = routing
    pairs = sorted(range(ids_TK.numel()), key=lambda pair: (ids_TK.flatten()[pair].item(), pair))
    got, order = sort_pairs(ids_TK, num_experts), sort_by_expert(ids_TK, num_experts)
    assert got.order_N.tolist() == pairs == order.order_N.tolist()
    assert torch.equal(got.rows_TK, order.rows_TK)
    assert got.offsets.tolist() == order.offsets.tolist()


def test_ids_that_are_none_stand_behind_all_others():
    got = sort_pairs(torch.tensor([[5, -1], [0, 1], [1, 7]], device=DEVICE), 2)
    assert got.offsets.tolist() == [0, 1, 3]
    assert got.order_N.tolist() == [2, 3, 4, 0, 1, 5]


@given(routings(), st.integers(1, 300), st.sampled_from([torch.float32, torch.bfloat16]))
@EXAMPLES
def test_rows_are_copied_and_added_up_in_fp32(routing, dim, dtype):
    ids_TK, num_experts = routing
    order = sort_pairs(ids_TK, num_experts)
    at, chosen_TK = (order.rows_TK, order.offsets[1:]), ids_TK < num_experts
    x_TD, rows_ND = (torch.randn(n, dim, device=DEVICE).to(dtype) for n in (len(ids_TK), ids_TK.numel()))
    rows_ND[int(order.offsets[-1]) :] = torch.nan  # of choices that are none
    copied_ND, added_TD = copy_rows(x_TD, *at), add_rows(rows_ND, *at)
    expected_TD = (rows_ND.double()[order.rows_TK].where(chosen_TK.unsqueeze(2), 0.0)).sum(dim=1)
    copies_TKD = x_TD.unsqueeze(1).expand(-1, ids_TK.shape[1], -1)
    assert torch.equal(copied_ND[order.rows_TK][chosen_TK], copies_TKD[chosen_TK])
    torch.testing.assert_close(added_TD.double(), expected_TD, rtol=ROUNDING[dtype], atol=1e-5)
    assert torch.equal(added_TD, add_rows(rows_ND, *at))


@given(routings(), st.sampled_from([1, 24, 96, 128, 200, 384]), st.sampled_from([torch.float32, torch.bfloat16]))
@EXAMPLES
def test_swiglu_and_its_gradient(routing, hidden, dtype):
    ids_TK, num_experts = routing
    order_N, _, offsets = sort_pairs(ids_TK, num_experts)
    ends_E, rows = offsets[1:], slice(int(offsets[-1]))  # behind them nothing is written
    hidden_NF = (3 * torch.randn(len(order_N), 2 * hidden, device=DEVICE)).to(dtype)
    d_act_NH = torch.randn(len(order_N), hidden, device=DEVICE).to(dtype)
    d_act_NH[rows.stop :] = 0
    weights_TK = torch.rand(ids_TK.shape, device=DEVICE)
    leaves = hidden_NF.double().requires_grad_(), weights_TK.double().requires_grad_()
    gate, up = leaves[0].chunk(2, dim=1)
    expected = F.silu(gate) * up * leaves[1].flatten()[order_N].unsqueeze(1)
    d_hidden, d_weights = torch.autograd.grad(expected, leaves, d_act_NH.double())
    hidden_NF[rows.stop :] = d_act_NH[rows.stop :] = torch.nan
    act_NH, d_hidden_NF, d_weights_TK = swiglu_gradient(hidden_NF, d_act_NH, order_N, weights_TK, ends_E)
    rounding = {"rtol": ROUNDING[dtype], "atol": 1e-5}
    assert torch.equal(act_NH[rows], swiglu(hidden_NF, order_N, weights_TK, ends_E)[rows])
    torch.testing.assert_close(act_NH.double()[rows], expected.detach()[rows], **rounding)
    torch.testing.assert_close(d_hidden_NF.double()[rows], d_hidden[rows], **rounding)
    assert d_weights_TK.dtype == torch.float32
    torch.testing.assert_close(d_weights_TK.double(), d_weights, rtol=1e-5, atol=1e-4)


def naive(x_TD: Tensor, gate_up_EFD: Tensor, down_EDH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    out, zero = [], 0 * sum(t.sum() for t in (x_TD, gate_up_EFD, down_EDH, weights_TK))
    for x_D, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = zero + torch.zeros_like(x_D)
        for e, weight in zip(ids, weights, strict=True):
            if e < len(gate_up_EFD):
                gate, up = (gate_up_EFD[e] @ x_D).chunk(2)
                y_D = y_D + weight * (down_EDH[e] @ (F.silu(gate) * up))
        out.append(y_D)
    return torch.stack(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropped", [0.0, 0.4])
@pytest.mark.parametrize(("tokens", "top_k", "skew"), [(1, 1, False), (37, 3, False), (50, 2, True)])
def test_output_and_every_gradient_are_those_of_loops(dtype, tokens, top_k, skew, dropped):
    num_experts, dim, hidden = 5, 16, 24
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(DEVICE)

    ids_TK = torch.stack([torch.randperm(num_experts, generator=generator)[:top_k] for _ in range(tokens)]).to(DEVICE)
    ids_TK = torch.zeros_like(ids_TK) if skew else ids_TK
    none_TK = torch.rand(ids_TK.shape, generator=generator).to(DEVICE) < dropped
    ids_TK = ids_TK.masked_fill(none_TK, num_experts)
    shapes = (tokens, dim), (num_experts, 2 * hidden, dim), (num_experts, dim, hidden)
    x, gate_up, down = (draw(*shape).to(dtype).requires_grad_() for shape in shapes)
    weights = torch.rand(tokens, top_k, generator=generator).to(DEVICE).masked_fill(none_TK, 3e30).requires_grad_()
    leaves = [x, gate_up, down, weights]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    dy = draw(tokens, dim).to(dtype)
    got, expected = fused_experts(x, gate_up, down, ids_TK, weights), naive(*wide[:3], ids_TK, wide[3])
    got.backward(dy)
    expected.backward(dy.double())
    for one, other in [(got, expected), *((a.grad, b.grad) for a, b in zip(leaves, wide, strict=True))]:
        assert one is not None and other is not None
        error = float((one.detach().double() - other.detach()).norm() / other.detach().norm().clamp(min=1e-30))
        assert error < (1e-5 if dtype == torch.float32 else 0.02)
    assert weights.grad is not None and weights.grad.dtype == torch.float32
    assert not weights.grad[none_TK].any()


def test_experts_of_unlike_widths_are_the_cpu_s():
    """A call for each run of one width, to which the experts of the others are none."""
    generator = torch.Generator().manual_seed(3)
    widths = [8, 8, 24, 16]
    shapes = (30, 16), (2 * sum(widths), 16), (sum(widths), 16), (30, 2)
    arguments = [(torch.randn(shape, generator=generator) / 4).requires_grad_() for shape in shapes]
    ids_TK = torch.randint(5, (30, 2), generator=generator)  # 4 is none
    x, gate_up, down, weights = arguments
    expected = uneven_experts(x, gate_up, down, ids_TK, weights, widths)
    there = [t.detach().to(DEVICE).requires_grad_() for t in arguments]
    got = uneven_grouped_experts(*there[:3], ids_TK.to(DEVICE), there[3], widths)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    direction = torch.randn(30, 16, generator=generator)
    wanted = torch.autograd.grad(expected, arguments, direction)
    for one, other in zip(torch.autograd.grad(got, there, direction.to(DEVICE)), wanted, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-4, atol=1e-5)


def test_gradients_that_nobody_wants_are_not_computed(monkeypatch: pytest.MonkeyPatch):
    if not kernels.has_grouped_mm():
        pytest.skip("needs torch with F.grouped_mm, whose calls it counts")
    products: list[Any] = []
    real = F.grouped_mm
    monkeypatch.setattr(kernels.F, "grouped_mm", lambda *a, **k: products.append(1) or real(*a, **k))
    x, ids = torch.randn(4, 8, device=DEVICE), torch.tensor([[0], [1], [1], [0]], device=DEVICE)
    gate_up, down = torch.randn(2, 16, 8, device=DEVICE), torch.randn(2, 8, 8, device=DEVICE)
    weights = torch.rand(4, 1, device=DEVICE, requires_grad=True)
    fused_experts(x, gate_up, down, ids, weights).sum().backward()
    assert len(products) == 3  # two forward, one to the hidden layer; no gradient of x or of an expert
    assert weights.grad is not None


def test_the_layers_way_off_the_cpu_is_this_one(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr("equipoise.layers.experts.fused_experts", lambda *a: calls.append(a) or fused_experts(*a))
    MoE(8, 16, 4, 2).to(DEVICE)(torch.randn(6, 8, device=DEVICE)).sum().backward()
    assert len(calls) == 1
