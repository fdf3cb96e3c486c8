"""The lab's own operators against the same mathematics written out in float64, and gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import library
from torch.autograd import gradcheck

from equipoise.lab.models.cpu_ops import attention, loss
from equipoise.lab.models.cpu_ops.attention import Positions, causal_attention
from equipoise.lab.models.cpu_ops.loss import linear_cross_entropy, token_losses
from equipoise.lab.models.cpu_ops.norm import RMSNorm

NARROW = {torch.float32: 2e-6, torch.bfloat16: 2e-2}  # dtype -> relative error of a whole tensor


def close(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    error = (found.double() - expected).norm() / expected.norm()
    assert error < NARROW[dtype], f"{error:.1e}"


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------- attention


def slow_attention(qkv, q_scale, k_scale, heads: int, eps: float, theta: float):
    """One query at a time, one head at a time; rotations as complex numbers."""
    batch, length, rows, size = qkv.shape
    groups = (rows - heads) // 2
    turns = torch.exp(1j * torch.outer(torch.arange(length), theta ** -(torch.arange(0, size, 2) / size)).double())

    def turned(x, scale):
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * scale
        z = torch.complex(x[..., : size // 2], x[..., size // 2 :]) * turns
        return torch.cat([z.real, z.imag], dim=-1)

    out = []
    for b in range(batch):
        for h in range(heads):
            g = heads + h // (heads // groups)
            q, k, v = turned(qkv[b, :, h], q_scale), turned(qkv[b, :, g], k_scale), qkv[b, :, g + groups]
            rows_of = [torch.softmax(q[i] @ k[: i + 1].T / math.sqrt(size), -1) @ v[: i + 1] for i in range(length)]
            out.append(torch.stack(rows_of))
    return torch.stack(out).view(batch, heads, length, size).transpose(1, 2).flatten(2)


def attention_case(batch=3, length=7, heads=4, groups=2, size=6):
    qkv = drawn(batch, length, heads + 2 * groups, size)
    scales = drawn(2, size, seed=1) * 0.3 + 1
    tables = Positions(*(t.double() for t in Positions.of(length, size, theta=100.0)))
    return qkv, *scales, tables


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 5), st.integers(1, 9), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]), st.integers(1, 4))
def test_attention_is_what_its_formula_says_however_it_is_cut(batch, length, heads, rows):
    """Blocks of a few queries and a few sequences, so that every edge is met."""
    qkv, q_scale, k_scale, tables = attention_case(batch, length, *heads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ROWS", rows)
        patch.setattr(attention, "HEADS", 8)
        found = causal_attention(qkv, q_scale, k_scale, tables, heads=heads[0], eps=1e-3)
    torch.testing.assert_close(found, slow_attention(qkv, q_scale, k_scale, heads[0], 1e-3, 100.0))


@pytest.mark.parametrize("longest", [512, 0], ids=["fused", "unfused"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_gradient_of_attention(monkeypatch, longest, groups):
    monkeypatch.setattr(attention, "ROWS", 3)
    monkeypatch.setattr(attention, "HEADS", 8)
    monkeypatch.setattr(attention, "LONGEST", longest)
    qkv, q_scale, k_scale, tables = attention_case(groups=groups)
    inputs = [x.clone().requires_grad_() for x in (qkv, q_scale, k_scale)]
    assert gradcheck(lambda *x: causal_attention(*x, tables, heads=4, eps=1e-3), inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", NARROW)
def test_attention_in_narrower_numbers(dtype):
    qkv, q_scale, k_scale, _ = attention_case(2, 140, 4, 2, 16)  # two blocks of queries
    wide = [x.clone().requires_grad_() for x in (qkv, q_scale, k_scale)]
    narrow = [qkv.to(dtype).requires_grad_(), *(x.float().requires_grad_() for x in (q_scale, k_scale))]
    weight = drawn(2, 140, 64, seed=2)
    expected = slow_attention(*wide, 4, 1e-6, 100.0)
    found = causal_attention(*narrow, Positions.of(140, 16, theta=100.0), heads=4, eps=1e-6)
    (expected * weight).sum().backward()
    (found * weight.to(dtype)).sum().backward()
    assert found.dtype == narrow[0].grad.dtype == dtype
    close(found, expected, dtype)
    for one, other in zip(narrow, wide, strict=True):
        close(one.grad, other.grad, dtype)


def test_without_gradient_no_attention_weights_are_kept():
    qkv, q_scale, k_scale, tables = attention_case()
    kept = attention._forward(qkv, q_scale, k_scale, *tables, 4, 1e-6, False)[-1]
    assert kept.numel() == 0
    with torch.no_grad():
        alone = causal_attention(qkv.requires_grad_(), q_scale, k_scale, tables, heads=4, eps=1e-6)
    assert torch.equal(alone, causal_attention(qkv, q_scale, k_scale, tables, heads=4, eps=1e-6))


# ---------------------------------------------------------------- output layer and loss


def slow_losses(x, weight, targets):
    return torch.stack([torch.logsumexp(weight @ row, 0) - weight[t] @ row for row, t in zip(x, targets, strict=True)])


def loss_case(tokens=11, words=7, dim=5):
    targets = torch.randint(0, words, (tokens,), generator=torch.Generator().manual_seed(3))
    return drawn(tokens, dim) * 3, drawn(words, dim, seed=1), targets


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 12), st.integers(1, 9), st.integers(1, 100))
def test_the_loss_is_the_mean_of_its_tokens_however_it_is_cut(tokens, words, together):
    x, weight, targets = loss_case(tokens, words)
    expected = slow_losses(x, weight, targets)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "LOGITS", together)
        torch.testing.assert_close(token_losses(x, weight, targets, torch.float64), expected)
        found = linear_cross_entropy(x, weight, targets, torch.float64)
    torch.testing.assert_close(found, expected.mean())


def test_gradient_of_the_loss(monkeypatch):
    monkeypatch.setattr(loss, "LOGITS", 21)  # 3 tokens at a time
    x, weight, targets = loss_case()
    inputs = [x.requires_grad_(), weight.requires_grad_()]
    assert gradcheck(lambda *i: 0.37 * linear_cross_entropy(*i, targets, torch.float64), inputs)
    for one in inputs:  # each also where the other is frozen
        for other in inputs:
            other.requires_grad_(other is one)
        assert gradcheck(lambda *i: linear_cross_entropy(*i, targets, torch.float64), inputs)


@pytest.mark.parametrize("dtype", NARROW)
def test_the_loss_in_narrower_numbers(dtype):
    x, weight, targets = loss_case(600, 300, 32)
    wide = [(x / 8).requires_grad_(), weight.clone().requires_grad_()]
    narrow = [i.detach().float().requires_grad_() for i in wide]
    expected = slow_losses(*wide, targets).mean()
    found = linear_cross_entropy(*narrow, targets, dtype)
    expected.backward()
    found.backward()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=NARROW[dtype] / 10, atol=0)
    for one, other in zip(narrow, wide, strict=True):
        close(one.grad, other.grad, dtype)


def test_a_certain_mistake_has_a_finite_loss():
    x, weight = torch.ones(1, 1), torch.tensor([[0.0], [500.0]])
    assert linear_cross_entropy(x, weight, torch.tensor([0]), torch.float32) == 500
    assert linear_cross_entropy(x, weight, torch.tensor([1]), torch.float32) == 0


# ---------------------------------------------------------------- norm


def test_norm_and_its_gradient():
    norm = RMSNorm(6, eps=1e-3).double()
    torch.nn.init.normal_(norm.weight)
    x = drawn(2, 5, 6)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x, torch.float64), expected)
    assert norm(x, torch.bfloat16).dtype == torch.bfloat16
    weight = norm.weight
    assert gradcheck(lambda x, w: torch.func.functional_call(norm, {"weight": w}, (x, torch.float64)),
                     [x.requires_grad_(), weight.detach().clone().requires_grad_()])  # fmt: skip


# ---------------------------------------------------------------- compilers


def test_what_a_compiler_is_told_about_the_operators_is_true():
    qkv, q_scale, k_scale, tables = attention_case()
    inputs = [x.requires_grad_() for x in (qkv, q_scale, k_scale)]
    library.opcheck(torch.ops.equipoise.attention_forward.default, (*inputs, *tables, 4, 1e-6, True))
    x, weight, targets = loss_case()
    library.opcheck(torch.ops.equipoise.linear_cross_entropy.default,
            (x.requires_grad_(), weight.requires_grad_(), targets, torch.float64, True))  # fmt: skip
