"""The bias rules against their formulas, one expert at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.functional import center, momentum_step, proportional_step, rms_step, sign_step, violation

quick = settings(max_examples=80, deadline=None)
loads = st.lists(st.integers(0, 10**6), min_size=1, max_size=12)
rules = pytest.mark.parametrize("rule", [violation, sign_step, proportional_step, rms_step])


def naive_violation(counts: list[int]) -> list[float]:
    mean = sum(counts) / len(counts)
    return [(mean - c) / mean if mean else 0.0 for c in counts]


@quick
@given(loads)
def test_formulas(counts):
    v = naive_violation(counts)
    rms = math.sqrt(math.fsum(x * x for x in v) / len(v))
    tensor = torch.tensor(counts)
    total = sum(counts)
    signs = [(total > c * len(counts)) - (total < c * len(counts)) for c in counts]  # exact: no division
    assert violation(tensor).tolist() == pytest.approx(v)
    assert proportional_step(tensor).tolist() == pytest.approx(v)
    assert rms_step(tensor).tolist() == pytest.approx([x / rms if rms else 0.0 for x in v])
    if total < 2**40 and all(abs(x) > 1e-9 or s == 0 for x, s in zip(v, signs, strict=True)):
        assert sign_step(tensor).tolist() == signs


@quick
@given(loads, st.integers(0, 2**31), st.floats(0.1, 5), st.floats(0, 0.95))
def test_momentum_formula(counts, seed, kappa, beta):
    old = torch.randn(len(counts), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    squashed = [math.tanh(kappa * x) for x in naive_violation(counts)]
    mean = math.fsum(squashed) / len(squashed)
    want = [beta * m + (1 - beta) * (s - mean) for m, s in zip(old.tolist(), squashed, strict=True)]
    before = old.clone()
    assert momentum_step(torch.tensor(counts), old, kappa, beta).tolist() == pytest.approx(want)
    assert torch.equal(old, before)


@rules
@quick
@given(counts=loads, power=st.integers(1, 20))
def test_blind_to_the_size_of_the_batch(rule, counts, power):
    """To the last bit for powers of two, within rounding for any factor: counting twice would not matter."""
    tensor = torch.tensor(counts)
    assert torch.equal(rule(tensor * 2**power), rule(tensor))
    zero = torch.zeros(len(counts), dtype=torch.float64)
    assert torch.equal(momentum_step(tensor * 2**power, zero), momentum_step(tensor, zero))
    if rule is not sign_step:  # its jump at 0 may sit on a rounding
        torch.testing.assert_close(rule(tensor * 7), rule(tensor), rtol=1e-9, atol=1e-9)


@rules
def test_less_loaded_experts_never_rise_less(rule):
    for seed in range(20):
        counts = torch.randint(0, 50, (9,), generator=torch.Generator().manual_seed(seed)).sort().values
        assert (rule(counts).diff() <= 0).all()


@rules
def test_nothing_counted_moves_nothing(rule):
    assert not rule(torch.zeros(5, dtype=torch.int64)).any()
    assert not rule(torch.full((5,), 3)).any()
    assert rule(torch.zeros(5)).dtype == torch.float64


@rules
def test_every_leading_dimension_is_its_own_layer(rule):
    counts = torch.randint(0, 99, (2, 3, 8), generator=torch.Generator().manual_seed(1))
    rows = torch.stack([torch.stack([rule(row) for row in layer]) for layer in counts])
    torch.testing.assert_close(rule(counts), rows, rtol=0, atol=0)


@quick
@given(loads)
def test_steps_are_centred_where_the_rule_says_so(counts):
    tensor = torch.tensor(counts)
    for step in (proportional_step(tensor), rms_step(tensor), momentum_step(tensor, torch.zeros(len(counts)).double())):
        assert float(step.mean()) == pytest.approx(0, abs=1e-9)


def test_rms_step_has_the_size_of_a_sign_step():
    for counts in ([1, 2, 3, 4], [1000, 0, 0, 0], [500, 501, 499, 500]):
        assert float(rms_step(torch.tensor(counts)).square().mean()) == pytest.approx(1)


def test_counts_above_two_to_the_53_do_not_overflow():
    assert sign_step(torch.tensor([2**60, 0])).tolist() == [-1, 1]


@quick
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=9), st.floats(-100, 100))
def test_center_removes_what_is_common(values, shift):
    tensor = torch.tensor(values, dtype=torch.float64)
    assert float(center(tensor).mean()) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(center(tensor + shift), center(tensor), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(center(center(tensor)), center(tensor), rtol=1e-9, atol=1e-9)
