"""The experts' products in a PyTorch without F.grouped_mm: the numbers of float64 loops, forward and backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.kernels import grouped_mm, has_grouped_mm
from equipoise.layers import Experts
from equipoise.layers.experts import grouped_experts

LOADS = [[3, 0, 5, 1], [9, 0, 0, 0], [0, 0, 0, 9], [0, 0, 0, 0]]
WITHOUT = "import torch.nn.functional as F; vars(F).pop('grouped_mm', None); "


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(F, "grouped_mm", raising=False)
    assert not has_grouped_mm()


def naive(x_TD: Tensor, gate_up_EFD: Tensor, down_EDH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """The definition, token by token and choice by choice."""
    out = []
    for x_D, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        halves = [(gate_up_EFD[e] @ x_D).chunk(2) for e in ids]
        parts = [w * (down_EDH[e] @ (F.silu(gate) * up)) for w, e, (gate, up) in zip(weights, ids, halves, strict=True)]
        out.append(torch.stack(parts).sum(dim=0))
    return torch.stack(out)


def problem(dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """(x, gate_up, down, weights), ids: expert 4 has no token and token 0 the same expert twice."""
    torch.manual_seed(0)
    ids_TK = torch.randint(4, (11, 2))
    ids_TK[0] = 1
    shapes = (11, 16), (5, 48, 16), (5, 16, 24)
    return [*((torch.randn(s) / s[-1] ** 0.5).to(dtype) for s in shapes), torch.rand(11, 2).to(dtype)], ids_TK


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)], ids=str)
def test_output_and_every_gradient_are_those_of_loops(dtype, bound, without):
    leaves, ids = problem(dtype)
    wide = [leaf.double().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_()
    dy = torch.randn(11, 16).to(dtype)
    got = grouped_experts(*leaves[:3], ids, leaves[3])
    expected = naive(*wide[:3], ids, wide[3])
    gradients = torch.autograd.grad(got, leaves, dy), torch.autograd.grad(expected, wide, dy.double())
    for one, other in zip((got, *gradients[0]), (expected, *gradients[1]), strict=True):
        assert one.dtype == dtype
        assert float((one.detach().double() - other.detach()).norm() / other.detach().norm()) <= bound
    assert not gradients[0][1][4].any() and not gradients[0][2][4].any()  # of the expert without tokens


@pytest.mark.parametrize("loads", LOADS, ids=str)
def test_products_are_those_of_float64_for_any_loads(loads, without):
    torch.manual_seed(0)
    rows, ends = sum(loads), torch.tensor(loads).cumsum(0, dtype=torch.int32)
    left, right, other = torch.randn(rows, 8), torch.randn(4, 8, 16), torch.randn(rows, 16)
    owner = torch.arange(4).repeat_interleave(torch.tensor(loads))
    expected = torch.einsum("na,nab->nb", left.double(), right.double()[owner])
    torch.testing.assert_close(grouped_mm(left, right, ends).double(), expected, rtol=1e-5, atol=1e-5)
    one_hot = F.one_hot(owner, 4).double()
    expected = torch.einsum("ne,na,nb->eab", one_hot, left.double(), other.double())
    torch.testing.assert_close(grouped_mm(left.t(), other, ends).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not has_grouped_mm(), reason="needs F.grouped_mm to compare with")
@pytest.mark.parametrize("loads", LOADS[:3], ids=str)
def test_both_ways_agree_in_shape_dtype_and_numbers(loads, monkeypatch):
    torch.manual_seed(0)
    rows, ends = sum(loads), torch.tensor(loads).cumsum(0, dtype=torch.int32)
    left, right, other = (torch.randn(*s).bfloat16() for s in ((rows, 8), (4, 8, 16), (rows, 16)))
    first = [grouped_mm(left, right, ends), grouped_mm(left.t(), other, ends)]
    monkeypatch.delattr(F, "grouped_mm")
    for a, b in zip(first, [grouped_mm(left, right, ends), grouped_mm(left.t(), other, ends)], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=1e-2)


def test_rows_of_no_expert_are_zero(without):
    """Pairs whose id names no expert are sorted behind the last end: nothing comes from them, forward or backward."""
    left, right = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8, 8, requires_grad=True)
    out = grouped_mm(left, right, torch.tensor([1, 3], dtype=torch.int32))
    assert not out[3:].any() and out[:3].all()
    out.sum().backward()
    assert left.grad is not None and not left.grad[3:].any() and left.grad[:3].any()


def test_the_cpu_s_way_does_without_it_too(without):
    torch.manual_seed(0)
    experts = Experts(5, 16, 24)
    (x, *_, weights), ids = problem(torch.float32)
    expected = naive(x.double(), experts.gate_up_proj.double(), experts.down_proj.double(), ids, weights.double())
    torch.testing.assert_close(experts(x, ids, weights).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux")
def test_the_kernels_way_does_without_it_too():
    """`fused_experts` against loops in Triton's interpreter, in a process that never had F.grouped_mm."""
    pytest.importorskip("triton")
    case = "tests/unit/kernels/_experts_cases.py"
    program = f"{WITHOUT}import sys, pytest; sys.exit(pytest.main(sys.argv[1:] + ['{case}']))"
    chosen = ["-k", "every_gradient_are_those_of_loops", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(
        [sys.executable, "-c", program, *chosen, "-W", "ignore::RuntimeWarning:triton.runtime.interpreter"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "12 passed" in done.stdout
