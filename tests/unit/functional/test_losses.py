"""Balance loss and z-loss against plain loops, their gradients, and what may and may not carry one."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import InputError
from equipoise.functional import (
    GATES,
    balance_loss,
    entropy_loss,
    gate_probs,
    load_fractions,
    segment_counts,
    sequence_segments,
    z_loss,
)
from equipoise.functional.routing import gate_slope

quick = settings(max_examples=60, deadline=None)


def naive_loss(probs, ids, segments, mask) -> float:
    """Mean over valid tokens of E <f, p_t>, f counted over the valid tokens of the token's own segment; an id of E is
    no choice."""
    num_experts = len(probs[0]) if probs else 1
    valid = [t for t in range(len(probs)) if mask[t]]
    terms = []
    for t in valid:
        own = [u for u in valid if segments[u] == segments[t]]
        chosen = [e for u in own for e in ids[u] if e < num_experts]
        f = [chosen.count(e) / max(len(chosen), 1) for e in range(num_experts)]
        terms.append(num_experts * math.fsum(f[e] * probs[t][e] for e in range(num_experts)))
    return math.fsum(terms) / max(len(valid), 1)


def tokens(seed: int, count: int, num_experts: int, top_k: int):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(count, num_experts, dtype=torch.float64, generator=generator)
    mask = torch.rand(count, generator=generator) > 0.3
    return logits.softmax(dim=1), logits.topk(top_k).indices, mask


@st.composite
def batches(draw):
    num_experts = draw(st.integers(1, 8))
    num_sequences, length = draw(st.integers(1, 4)), draw(st.integers(0, 5))
    probs, ids, mask = tokens(
        draw(st.integers(0, 2**31)), num_sequences * length, num_experts, draw(st.integers(1, num_experts))
    )
    ids = ids.masked_fill(probs.gather(1, ids) < draw(st.sampled_from([0.0, 0.2, 2.0])), num_experts)  # no choice
    return probs, ids, mask, num_sequences, length


@quick
@given(batches(), st.booleans(), st.integers(1, 4), st.sampled_from(["micro_batch", "sequences", "documents"]))
def test_loss_is_the_loop_at_every_scope_inside_a_micro_batch(batch, masked, per_segment, scope):
    probs, ids, mask, num_sequences, length = batch
    count = num_sequences * length
    if scope == "micro_batch":
        segments = None
    elif scope == "sequences":
        segments = sequence_segments(num_sequences, length, per_segment)
        assert segments.tolist() == [t // length // per_segment for t in range(count)]
    else:
        segments = torch.randint(0, max(count, 1), (count,), generator=torch.Generator().manual_seed(per_segment))
    got = balance_loss(probs, ids, segment_T=segments, token_mask_T=mask if masked else None)
    want = naive_loss(
        probs.tolist(),
        ids.tolist(),
        [0] * count if segments is None else segments.tolist(),
        mask.tolist() if masked else [True] * count,
    )
    assert got.shape == ()
    assert float(got) == pytest.approx(want, rel=1e-12)


@quick
@given(batches())
def test_segment_counts_and_fractions_are_those_of_a_loop(batch):
    probs, ids, mask, num_sequences, length = batch
    num_experts = probs.shape[1]
    segments = sequence_segments(num_sequences, length)
    counts = segment_counts(ids, num_experts, segments.int(), mask)
    assert counts.dtype == torch.int64
    for s, row in enumerate(counts.tolist()):
        inside = [t for t in range(len(probs)) if segments[t] == s and mask[t]]
        assert row == [sum(e in ids[t].tolist() for t in inside) for e in range(num_experts)]
    sums = load_fractions(counts).sum(dim=-1)
    torch.testing.assert_close(sums, (counts.sum(dim=-1) > 0).double())


def test_the_value_is_one_in_balance_and_e_in_collapse():
    for num_experts in (1, 2, 7):
        ids = torch.arange(num_experts * 3).unsqueeze(1) % num_experts
        uniform = torch.full((num_experts * 3, num_experts), 1 / num_experts, dtype=torch.float64)
        assert float(balance_loss(uniform, ids)) == pytest.approx(1)
        one_hot = torch.zeros_like(uniform).index_fill_(1, torch.tensor([0]), 1.0)
        assert float(balance_loss(one_hot, torch.zeros_like(ids))) == pytest.approx(num_experts)
        # uniform probabilities hide any load, and any probabilities are 1 under a balanced one
        assert float(balance_loss(uniform, torch.zeros_like(ids))) == pytest.approx(1)
        assert float(balance_loss(one_hot, ids)) == pytest.approx(1)


def test_the_value_can_fall_below_one():
    """It is no measure of balance: tokens may be sure of what the others do not choose."""
    probs = torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.0, 1.0]], dtype=torch.float64)
    assert float(balance_loss(probs, torch.tensor([[0], [0], [1]]))) < 1


@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "other counts"])
def test_only_the_probabilities_carry_a_gradient(scope):
    probs, ids, mask = tokens(1, 12, 5, 2)
    probs.requires_grad_()
    segments = sequence_segments(3, 4) if scope == "sequence" else None
    other = torch.tensor([9.0, 1, 0, 4, 2], dtype=torch.float64, requires_grad=True)
    counts = other if scope == "other counts" else None
    loss = balance_loss(
        probs, ids, segment_T=segments, token_mask_T=mask, counts_E=None if counts is None else counts.detach()
    )
    (gradient,) = torch.autograd.grad(loss, probs)
    owners = torch.zeros(12, dtype=torch.int64) if segments is None else segments
    for t in range(12):
        if counts is not None:
            fraction = counts.detach() / counts.detach().sum()
        else:
            fraction = load_fractions(segment_counts(ids, 5, owners, mask))[owners[t]]
        want = 5 * fraction / mask.sum() if mask[t] else torch.zeros(5)
        torch.testing.assert_close(gradient[t], want.double())


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("scope", ["micro_batch", "sequence", "other counts"])
def test_gradients_at_the_logits(gate, scope):
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(8, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = torch.randint(0, 4, (8, 2), generator=generator)
    mask = torch.tensor([True] * 6 + [False] * 2)
    more = {
        "micro_batch": {},
        "sequence": {"segment_T": sequence_segments(2, 4)},
        "other counts": {"counts_E": torch.tensor([7, 0, 2, 1])},
    }[scope]
    assert torch.autograd.gradcheck(
        lambda z: balance_loss(gate_probs(z, gate), ids, token_mask_T=mask, **more), (logits,)
    )
    assert torch.autograd.gradcheck(lambda z: z_loss(z, mask), (logits,))


@pytest.mark.parametrize("gate", GATES)
def test_closed_form_at_the_logits(gate):
    """dz = d log g/dz * p * (q - <p, q>), q = E f / T: what the fused path uses. Softmax's form is wrong elsewhere."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(20, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    ids = logits.topk(2).indices
    (by_autograd,) = torch.autograd.grad(balance_loss(gate_probs(logits, gate), ids), logits)
    z = logits.detach()
    p, q = gate_probs(z, gate), 6 * load_fractions(torch.bincount(ids.reshape(-1), minlength=6)) / 20
    softmax_form = p * (q - (p * q).sum(dim=1, keepdim=True))
    torch.testing.assert_close(by_autograd, gate_slope(z, gate) * softmax_form)
    off = (softmax_form - by_autograd).norm() / by_autograd.norm()
    assert (off < 1e-12) == (gate == "softmax")


@quick
@given(st.integers(0, 2**31), st.lists(st.integers(0, 30), min_size=1, max_size=5))
def test_with_counts_of_the_whole_batch_any_cut_adds_up_to_one_loss(seed, sizes):
    """Token-weighted pieces with the global f give value and gradient of the uncut batch (2501.11873, eq. 4-6)."""
    probs, ids, mask = tokens(seed, sum(sizes), 6, 2)
    probs.requires_grad_()
    counts = segment_counts(ids, 6, torch.zeros(sum(sizes), dtype=torch.int64), mask)[0]
    whole = balance_loss(probs, ids, token_mask_T=mask)
    valid = max(int(mask.sum()), 1)
    pieces = [
        balance_loss(p, i, token_mask_T=m, counts_E=counts) * (m.sum() / valid)
        for p, i, m in zip(probs.split(sizes), ids.split(sizes), mask.split(sizes), strict=True)
    ]
    total = torch.stack(pieces).sum()
    torch.testing.assert_close(total, whole)
    one, other = (torch.autograd.grad(value, probs)[0] for value in (total, whole))
    torch.testing.assert_close(one, other)


def test_a_mean_of_means_is_another_loss():
    probs, ids, _ = tokens(4, 1000, 6, 2)
    ids[:100] = 0
    counts = torch.bincount(ids.reshape(-1), minlength=6)
    small, large = (balance_loss(probs[s], ids[s], counts_E=counts) for s in (slice(100), slice(100, None)))
    whole = balance_loss(probs, ids)
    torch.testing.assert_close((100 * small + 900 * large) / 1000, whole)
    assert abs(float((small + large) / 2 - whole)) > 1e-3


@quick
@given(batches(), st.integers(0, 2**31))
def test_masked_tokens_and_the_numbering_do_not_matter(batch, seed):
    probs, ids, mask, *_ = batch
    generator = torch.Generator().manual_seed(seed)
    want = balance_loss(probs[mask], ids[mask])
    torch.testing.assert_close(balance_loss(probs, ids, token_mask_T=mask), want)
    torch.testing.assert_close(balance_loss(probs, ids, token_mask_T=mask.long()), want)
    experts, order = (torch.randperm(n, generator=generator) for n in (probs.shape[1], len(probs)))
    renamed = torch.cat([experts.argsort(), torch.tensor([len(experts)])])[ids] if ids.numel() else ids
    torch.testing.assert_close(balance_loss(probs[order][:, experts], renamed[order], token_mask_T=mask[order]), want)


@quick
@given(batches())
def test_z_loss_is_the_loop(batch):
    probs, _, mask, *_ = batch
    logits = probs.log() + 3
    terms = [
        math.log(math.fsum(math.exp(z) for z in row)) ** 2 for row, m in zip(logits.tolist(), mask, strict=True) if m
    ]
    assert float(z_loss(logits, mask)) == pytest.approx(math.fsum(terms) / max(len(terms), 1), rel=1e-9)


def test_z_loss_is_finite_where_exp_overflows():
    logits = torch.tensor([[1e4, 0.0], [-1e4, -1e4]], requires_grad=True)
    loss = z_loss(logits)
    assert float(loss.detach()) == pytest.approx(1e8, rel=1e-3)
    loss.backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("gate", GATES)
def test_the_entropy_and_its_gradient_know_only_the_experts_that_a_token_sees(gate):
    """Logits of -inf are those of a model with fewer experts: the same value, the same slope, and 0 at the others."""
    z_TE = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    few_TE, hidden_TE = z_TE[:, :3].clone().requires_grad_(), z_TE.clone()
    hidden_TE[:, 3] = -math.inf
    hidden_TE.requires_grad_()
    want, got = entropy_loss(few_TE, gate), entropy_loss(hidden_TE, gate)
    want.backward()
    got.backward()
    assert few_TE.grad is not None and hidden_TE.grad is not None and few_TE.grad.abs().max() > 0.01
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(hidden_TE.grad[:, :3], few_TE.grad)
    assert (hidden_TE.grad[:, 3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype):
    probs, ids, mask = tokens(5, 4001, 8, 2)
    low = probs.to(dtype)
    want = balance_loss(low.double(), ids, token_mask_T=mask)
    got = balance_loss(low, ids, token_mask_T=mask)
    assert got.dtype == torch.float32
    assert float(got) == pytest.approx(float(want), rel=1e-6)
    logits = (20 * probs).to(dtype)
    assert float(z_loss(logits, mask)) == pytest.approx(float(z_loss(logits.double(), mask)), rel=1e-6)


def test_without_a_valid_token_the_loss_is_zero_and_so_is_its_gradient():
    for count, mask in ((0, None), (3, torch.zeros(3, dtype=torch.bool))):
        logits = torch.randn(count, 4, requires_grad=True)
        loss = balance_loss(logits.softmax(dim=1), torch.zeros(count, 2, dtype=torch.int64), token_mask_T=mask)
        loss = loss + z_loss(logits, mask)
        loss.backward()
        assert float(loss.detach()) == 0
        assert logits.grad is not None
        assert not logits.grad.any()


@pytest.mark.parametrize(
    ("word", "arguments"),
    [
        ("one source", {"segment_T": torch.zeros(4, dtype=torch.int64), "counts_E": torch.ones(3)}),
        ("boolean", {"token_mask_T": torch.zeros(4), "counts_E": torch.ones(3)}),
        ("(4,)", {"token_mask_T": torch.ones(4, 1, dtype=torch.bool), "counts_E": torch.ones(3)}),
        ("(4,)", {"token_mask_T": torch.ones(4, 1, dtype=torch.bool)}),
        ("(4,)", {"token_mask_T": torch.ones(3, dtype=torch.bool), "segment_T": torch.zeros(4, dtype=torch.int64)}),
    ],
)
def test_what_is_ambiguous_is_refused(word, arguments):
    with pytest.raises(InputError) as caught:
        balance_loss(torch.full((4, 3), 1 / 3), torch.zeros(4, 1, dtype=torch.int64), **arguments)
    assert word in str(caught.value)
