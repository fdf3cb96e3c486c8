"""Experts of unlike widths: both forms against a loop in float64, and what of the layer depends on it."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, library, nn
from torch.utils import checkpoint as ckpt

from equipoise import AuxLoss, Balancer, MoE
from equipoise.errors import ConfigError, InputError
from equipoise.layers import Experts
from equipoise.layers.cpu.uneven_experts import uneven_experts
from equipoise.layers.experts import uneven_grouped_experts

DTYPES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 1.5e-2}
NAMES = ["y", "dx", "dgate_up", "ddown", "dweights"]
WIDTHS = [8, 8, 24, 16, 40]  # what grouped products take in bf16 too


def loop(x_TD: Tensor, gate_up_FD: Tensor, down_HD: Tensor, ids_TK: Tensor, weights_TK: Tensor, widths) -> Tensor:
    """The definition, one token and one choice at a time; an id of E is none."""
    zero = 0 * sum(t.sum() for t in (x_TD, gate_up_FD, down_HD, weights_TK))  # all have a gradient, if but 0
    rows = []
    for x, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y = zero + torch.zeros_like(x)
        for e, weight in zip(ids, weights, strict=True):
            if e < len(widths):
                start, width = sum(widths[:e]), widths[e]
                gate = gate_up_FD[2 * start : 2 * start + width] @ x
                up = gate_up_FD[2 * start + width : 2 * (start + width)] @ x
                y = y + weight * (down_HD[start : start + width].T @ (gate * torch.sigmoid(gate) * up))
        rows.append(y)
    return torch.stack(rows)


def problem(widths=WIDTHS, tokens=40, dim=8, top_k=3, dtype=torch.float64, dropped=0.0):
    """Arguments, of which expert 1 gets no token; so large a part of the choices is none, with garbage for a weight."""
    torch.manual_seed(len(widths))
    ids = torch.randint(len(widths), (tokens, top_k))
    ids[ids == 1] = 0
    none = torch.rand(tokens, top_k) < dropped
    x, gate_up, down = (
        torch.randn(tokens, dim),
        torch.randn(2 * sum(widths), dim) / 3,
        torch.randn(sum(widths), dim) / 4,
    )
    weights = torch.rand(tokens, top_k).masked_fill(none, 3e30).to(torch.promote_types(dtype, torch.float32))
    ids = ids.masked_fill(none, len(widths))
    return x.to(dtype), gate_up.to(dtype), down.to(dtype), ids, weights, list(widths)


def with_gradients(function, arguments) -> list[Tensor]:
    x, gate_up, down, ids, weights, widths = arguments
    leaves = [t.clone().requires_grad_() for t in (x, gate_up, down, weights)]
    y = function(*leaves[:3], ids, leaves[3], widths)
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, direction)]


def assert_near(got: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for name, a, b in zip(NAMES, got, expected, strict=True):
        error = (a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropped", [0.0, 0.4, 1.0])
def test_both_forms_are_the_loop(dtype, dropped):
    arguments = problem(dtype=dtype, dropped=dropped)
    expected = with_gradients(
        loop, [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
    )
    forms = [uneven_experts] if dtype == torch.float64 else [uneven_experts, uneven_grouped_experts]
    for form in forms:
        got = with_gradients(form, arguments)
        assert_near(got, expected, DTYPES[dtype])
        assert not got[4][arguments[3] == len(WIDTHS)].any()
        assert not got[2][16:32].any() and not got[3][8:16].any(), "expert 1 has no token"


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 20), st.integers(1, 4), st.integers(0, 99))
@settings(deadline=None, max_examples=30)
def test_any_widths_and_loads(widths, tokens, top_k, seed):
    arguments = list(problem(widths, tokens, top_k=top_k))
    arguments[3] = torch.randint(len(widths) + 1, (tokens, top_k), generator=torch.Generator().manual_seed(seed))
    got = with_gradients(uneven_experts, arguments)
    if tokens:
        assert_near(got, with_gradients(loop, arguments), 1e-12)
    else:
        assert all(not t.any() for t in got)


def test_many_rows_are_padded_in_bf16():
    arguments = problem(tokens=3000, dtype=torch.bfloat16, top_k=2)

    def by_expert(x, gate_up, down, ids, weights, widths):
        weights_TE = torch.zeros(len(x), len(widths), dtype=x.dtype).scatter_add(1, ids, weights)
        y, start = 0 * x, 0
        for e, width in enumerate(widths):
            gate, up = (x @ gate_up[2 * start : 2 * (start + width)].T).chunk(2, dim=1)
            y, start = y + weights_TE[:, e : e + 1] * ((F.silu(gate) * up) @ down[start : start + width]), start + width
        return y

    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments]
    got = with_gradients(uneven_experts, arguments)
    assert_near(got, with_gradients(by_expert, wide), 1.5e-2)
    for a, b in zip(got, with_gradients(uneven_experts, arguments), strict=True):
        assert torch.equal(a, b)


def test_the_operator_keeps_pytorch_s_rules():
    x, gate_up, down, ids, weights, widths = problem(dtype=torch.float32, tokens=64, widths=[4, 12, 8])
    ids = torch.arange(64 * 3).view(64, 3) % 3  # no idle row, in which lies what the memory held
    leaves = x.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_(), ids, weights.requires_grad_(), widths
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    library.opcheck(torch.ops.equipoise.uneven_experts_forward, leaves, test_utils=checks)


def test_a_bad_token_stays_with_its_experts():
    x, gate_up, down, ids, weights, widths = problem(dtype=torch.bfloat16)
    x[7], ids[7] = float("nan"), torch.tensor([2, 3, 2])
    y, dx, d_gate_up, d_down, _ = with_gradients(uneven_experts, (x, gate_up, down, ids, weights, widths))
    others = [t for t in range(len(x)) if t != 7]
    assert y[7].isnan().all() and y[others].isfinite().all() and dx[others].isfinite().all()
    assert d_gate_up[: 2 * 16].isfinite().all() and d_down[-40:].isfinite().all()


MODES = {
    "checkpoint": lambda m: lambda *a: ckpt.checkpoint(m, *a, use_reentrant=False),
    "compile": lambda m: torch.compile(m, fullgraph=True, backend="aot_eager"),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_the_same_bits(mode):
    torch.manual_seed(3)
    module = Experts(5, 8, WIDTHS)
    x, _, _, ids, weights, _ = problem(dtype=torch.bfloat16)

    def run(call):
        leaves = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = call(leaves[0], ids, leaves[1])
        owner = call if isinstance(call, Experts) else module
        return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [*leaves, *owner.parameters()])]

    for a, b in zip(run(MODES[mode](module)), run(module), strict=True):
        assert torch.equal(a, b)


def test_equal_widths_are_the_layer_as_it_was():
    torch.manual_seed(0)
    listed = Experts(4, 8, [16] * 4)
    torch.manual_seed(0)
    plain = Experts(4, 8, 16)
    assert listed.hidden == plain.hidden == 16
    assert listed.state_dict().keys() == plain.state_dict().keys()
    x, ids, weights = torch.randn(9, 8), torch.randint(4, (9, 2)), torch.rand(9, 2)
    assert torch.equal(listed(x, ids, weights), plain(x, ids, weights))
    assert MoE(8, [16] * 4, 4, 2).gate.traits.widths is None


def test_weights_begin_by_the_width_of_their_expert_and_load_and_save():
    torch.manual_seed(0)
    experts = Experts(2, 400, [100, 2500])
    assert {name: tuple(p.shape) for name, p in experts.named_parameters()} == {
        "gate_up_proj": (5200, 400),
        "down_proj": (2600, 400),
    }
    narrow, wide = experts.down_proj.split([100, 2500])
    assert narrow.std().item() == pytest.approx(0.1, rel=0.02)
    assert wide.std().item() == pytest.approx(0.02, rel=0.02)
    assert experts.gate_up_proj.std().item() == pytest.approx(0.05, rel=0.02)
    other = Experts(2, 400, [100, 2500])
    other.load_state_dict(experts.state_dict())
    x, ids, weights = torch.randn(5, 400), torch.randint(2, (5, 2)), torch.rand(5, 2)
    assert torch.equal(other(x, ids, weights), experts(x, ids, weights))
    with pytest.raises(RuntimeError, match="size mismatch"):
        Experts(2, 400, [200, 2400]).load_state_dict(Experts(2, 400, [200, 2500]).state_dict())


def test_born_on_meta():
    with torch.device("meta"):
        module = Experts(5, 8, WIDTHS)
        assert module(torch.empty(7, 8), torch.empty(7, 2, dtype=torch.int64), torch.empty(7, 2)).shape == (7, 8)
    module.to_empty(device="cpu")
    torch.manual_seed(0)
    module.reset_parameters()
    torch.manual_seed(0)
    for a, b in zip(module.parameters(), Experts(5, 8, WIDTHS).parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_router_knows_the_widths_of_its_experts():
    layer: nn.Module = MoE(8, WIDTHS, 5, 2)
    assert layer.gate.traits.widths == tuple(WIDTHS)
    assert layer(torch.randn(2, 3, 8)).shape == (2, 3, 8)
    assert "hidden=(8, 8, 24, 16, 40)" in repr(layer.experts)


@pytest.mark.parametrize(
    ("hidden", "words"),
    [
        ([8, 8], "a width for each of 3 experts"),
        ([], "a width for each of 3 experts"),
        ([8, 0, 8], "at least 1"),
        ([8, 8.5, 8], "whole numbers"),
        (0, "at least 1"),
        (16.0, "whole numbers"),
        (np.int64(16), "whole numbers"),
        (None, "whole numbers"),
        (True, "whole numbers"),
    ],
)
def test_widths_that_do_not_fit_are_refused(hidden, words):
    with pytest.raises(ConfigError, match=words):
        Experts(3, 8, hidden)


def test_what_cannot_be_is_said():
    with pytest.raises(ConfigError, match="pass shared_hidden"):
        MoE(8, [8, 16], 2, 1, num_shared=1)
    assert MoE(8, [8, 16], 2, 1, num_shared=1, shared_hidden=24).shared_experts.up_proj.out_features == 24
    with pytest.raises(InputError, match=r"expert ids in 0\.\.4, or 5 for none"):
        Experts(5, 8, WIDTHS)(torch.randn(2, 8), torch.full((2, 1), 6), torch.ones(2, 1))
    with pytest.raises(ConfigError, match="multiples of 8"):
        uneven_grouped_experts(*problem([8, 12], dtype=torch.bfloat16))


@pytest.mark.parametrize("widths", [(1, 2), (8, 8, 24, 16, 0), (8, 8, 24, 16, float("nan"))])
def test_widths_that_somebody_sets_are_looked_at(widths):
    layer = MoE(8, 16, 5, 2, batch_first=True)
    layer.gate.expert_widths = widths
    with pytest.raises(ConfigError, match="one for each of 5 experts"):
        Balancer(layer, [AuxLoss("micro_batch", costs="width")])


def test_what_cannot_matter_is_refused():
    with pytest.raises(ConfigError, match="top_k of 2 or more beside top_p"):
        MoE(8, 16, 5, 1, top_p=0.6)
    with pytest.raises(ConfigError, match="num_shared and shared_hidden of 0 or more"):
        MoE(8, 16, 5, 2, num_shared=-1)
