"""Load metrics against plain loops, at their bounds, and the noise floor against simulated routers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.functional import (
    cv,
    dead_experts,
    efficiency,
    gini,
    maxvio,
    maxvio_noise_floor,
    min_max_ratio,
    mutual_information,
    normalized_entropy,
)
from equipoise.report.data.order_statistics import random_maxvio

quick = settings(max_examples=80, deadline=None)
loads = st.lists(st.integers(0, 10**9), min_size=1, max_size=12).filter(any)
TINY = 1e-12


def naive(counts: list[int]) -> dict:
    n, total = len(counts), sum(counts)
    mean = total / n
    f = [c / total for c in counts]
    pairs = sum(abs(a - b) for a in counts for b in counts)
    return {
        maxvio: max(counts) / mean - 1,
        cv: math.sqrt(math.fsum((c - mean) ** 2 for c in counts) / n) / mean,
        normalized_entropy: -math.fsum(x * math.log(x) for x in f if x) / math.log(n) if n > 1 else 1.0,
        gini: pairs / (2 * n * n * mean),
        dead_experts: counts.count(0),
        min_max_ratio: min(counts) / max(counts),
        efficiency: mean / max(counts),
    }


METRICS = list(naive([1]))
metrics = pytest.mark.parametrize("metric", METRICS, ids=lambda metric: metric.__name__)
IN_BALANCE = {maxvio: 0, cv: 0, normalized_entropy: 1, gini: 0, dead_experts: 0, min_max_ratio: 1, efficiency: 1}


def in_collapse(metric, n: int) -> float:
    return {
        maxvio: n - 1, cv: math.sqrt(n - 1), normalized_entropy: 0 if n > 1 else 1, gini: (n - 1) / n,
        dead_experts: n - 1, min_max_ratio: 0 if n > 1 else 1, efficiency: 1 / n,
    }[metric]  # fmt: skip


@metrics
@quick
@given(counts=loads)
def test_metrics_are_their_formulas_inside_their_bounds(metric, counts):
    got = metric(torch.tensor(counts))
    assert float(got) == pytest.approx(naive(counts)[metric], rel=1e-9, abs=1e-12)
    assert got.dtype == torch.float64
    low, high = sorted((IN_BALANCE[metric], in_collapse(metric, len(counts))))
    assert low - TINY <= float(got) <= high + 1e-9


@metrics
@quick
@given(counts=loads, seed=st.integers(0, 2**31), factor=st.integers(1, 1000))
def test_metrics_do_not_see_numbering_or_batch_size(metric, counts, seed, factor):
    tensor = torch.tensor(counts)
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(metric(tensor[order]), metric(tensor))
    torch.testing.assert_close(metric(tensor * factor), metric(tensor), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(metric(tensor.double()), metric(tensor))


@metrics
@pytest.mark.parametrize("num_experts", [1, 2, 64])
def test_the_ends_of_the_scale(metric, num_experts):
    for each in (1, 12345):
        assert float(metric(torch.full((num_experts,), each))) == pytest.approx(IN_BALANCE[metric], abs=TINY)
    alone = torch.zeros(num_experts, dtype=torch.int64).index_fill_(0, torch.tensor([num_experts // 2]), 77)
    assert float(metric(alone)) == pytest.approx(in_collapse(metric, num_experts), abs=TINY)
    assert math.isnan(metric(torch.zeros(num_experts)))  # nothing counted is neither balance nor imbalance


@metrics
def test_leading_dimensions_are_layers(metric):
    counts = torch.randint(0, 9, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    counts[1, 1] = 0
    rows = torch.stack([torch.stack([metric(row) for row in layer]) for layer in counts])
    assert metric(counts).shape == (2, 3)
    torch.testing.assert_close(metric(counts), rows, rtol=TINY, atol=0, equal_nan=True)
    assert metric(counts).isnan().tolist() == [[False] * 3, [False, True, False]]
    assert metric(torch.zeros(0, 5)).shape == (0,)


@quick
@given(loads)
def test_moving_load_from_the_richest_to_the_poorest_helps_by_every_measure(counts):
    """Pigou-Dalton: a transfer that does not overshoot never makes a measure of inequality worse."""
    low, high = counts.index(min(counts)), counts.index(max(counts))
    moved = list(counts)
    step = (counts[high] - counts[low]) // 3
    moved[high] -= step
    moved[low] += step
    before, after = torch.tensor(counts), torch.tensor(moved)
    for metric in METRICS:
        better = float(metric(after) - metric(before)) * (-1 if IN_BALANCE[metric] == 0 else 1)
        assert better >= -1e-9


def test_dead_experts_below_a_share_of_the_mean():
    counts = torch.tensor([100, 1, 0, 51, 48])  # mean 40
    assert [int(dead_experts(counts, below=x)) for x in (0.0, 0.02, 0.025, 1.2)] == [1, 1, 2, 3]


def uniform_maxvio(tokens: int, top_k: int, num_experts: int, repeats: int) -> tuple[float, float]:
    """Mean MaxVio of ``repeats`` batches whose tokens draw K distinct experts at random, and its standard error."""
    generator = torch.Generator().manual_seed(tokens)
    values = []
    for _ in range(repeats):
        ids = torch.rand(tokens, num_experts, generator=generator).topk(top_k).indices
        counts = torch.bincount(ids.reshape(-1), minlength=num_experts).tolist()
        values.append(max(counts) * num_experts / (tokens * top_k) - 1)
    sample = torch.tensor(values, dtype=torch.float64)
    return float(sample.mean()), float(sample.std()) / math.sqrt(repeats)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_experts"),
    [(256, 2, 16), (1024, 2, 16), (32, 2, 16), (8, 2, 16), (512, 8, 64), (64, 1, 64), (16, 4, 64), (500, 1, 2),
     (300, 3, 4), (128, 4, 128)],
)  # fmt: skip
def test_noise_floor_is_what_uniform_random_routing_shows(tokens, top_k, num_experts):
    mean, error = uniform_maxvio(tokens, top_k, num_experts, repeats=400)
    floor = maxvio_noise_floor(tokens, top_k, num_experts)
    assert abs(floor - mean) < 0.06 * mean + 3 * error


def test_noise_floor_at_its_ends():
    assert maxvio_noise_floor(1000, 8, 8) == 0  # K = E: everybody gets everything
    assert maxvio_noise_floor(1000, 1, 1) == 0
    assert maxvio_noise_floor(0, 2, 8) == maxvio_noise_floor(10, 0, 8) == maxvio_noise_floor(10, 9, 8) == 0
    assert maxvio_noise_floor(1, 2, 8) == 3  # one token: its two experts get 4 times the mean
    floors = [maxvio_noise_floor(4**n, 2, 16) for n in range(4, 12)]
    assert all(0.45 < b / a < 0.55 for a, b in itertools.pairwise(floors))  # 1 / sqrt(tokens)


@given(st.integers(0, 10**7), st.integers(1, 16), st.integers(1, 512))
def test_the_report_which_needs_no_torch_prints_the_same_floor(tokens, top_k, num_experts):
    top_k = min(top_k, num_experts)
    assert random_maxvio(tokens, top_k, num_experts) == maxvio_noise_floor(tokens, top_k, num_experts)


def naive_information(counts: list[list[int]], equal_domains: bool) -> float:
    """Sum of p(d, e) ln(p(d, e) / (p(d) p(e))), from a joint table."""
    rows = [row for row in counts if sum(row)]
    total = sum(map(sum, rows))
    weight = [1 / len(rows) if equal_domains else sum(row) / total for row in rows]
    joint = [[w * c / sum(row) for c in row] for w, row in zip(weight, rows, strict=True)]
    share = [math.fsum(column) for column in zip(*joint, strict=True)]
    return math.fsum(
        p * math.log(p / (w * share[e])) for w, row in zip(weight, joint, strict=True) for e, p in enumerate(row) if p
    )


@quick
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 2**31), st.booleans())
def test_mutual_information_is_the_sum_over_the_joint_table(num_domains, num_experts, seed, equal):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 20, (num_domains, num_experts), generator=generator)
    counts *= torch.rand(num_domains, 1, generator=generator) > 0.2
    got = float(mutual_information(counts, equal_domains=equal))
    if not counts.any():
        assert math.isnan(got)
        return
    want = naive_information(counts.tolist(), equal)
    assert got == pytest.approx(want, abs=1e-12)
    domains, used = int((counts.sum(dim=1) > 0).sum()), int((counts.sum(dim=0) > 0).sum())
    assert 0 <= got <= math.log(max(min(domains, used), 1)) + 1e-12
    swap = torch.randperm(num_experts, generator=generator)
    assert float(mutual_information(counts[:, swap].flip(0), equal_domains=equal)) == pytest.approx(got, abs=1e-12)


def test_mutual_information_at_its_ends():
    assert float(mutual_information(torch.eye(5))) == pytest.approx(math.log(5))
    assert float(mutual_information(torch.tensor([[10, 20, 70], [1, 2, 7]]))) == pytest.approx(0, abs=1e-12)
    assert float(mutual_information(torch.tensor([[4, 5]]))) == pytest.approx(0, abs=1e-12)
    assert math.isnan(mutual_information(torch.zeros(3, 4)))
    layers = torch.randint(0, 9, (2, 3, 4), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(mutual_information(layers), torch.stack([mutual_information(x) for x in layers]))


def test_equal_domains_forget_how_much_text_there_was():
    counts = torch.tensor([[30, 10], [1, 3]])
    more = counts * torch.tensor([[1], [1000]])
    assert float(mutual_information(more)) == pytest.approx(float(mutual_information(counts)))
    one, other = (float(mutual_information(x, equal_domains=False)) for x in (counts, more))
    assert abs(one - other) > 1e-3


@pytest.mark.parametrize(("num_domains", "num_experts", "tokens"), [(3, 16, 400), (5, 8, 200)])
def test_shuffled_labels_leave_the_floor_that_the_docstring_says(num_domains, num_experts, tokens):
    """Without any relation the estimate is still about (E - 1)(D - 1) / (2 N): the control has to be subtracted."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(num_domains).repeat_interleave(tokens)
    experts = torch.randint(0, num_experts, labels.shape, generator=generator)
    values = []
    for _ in range(200):
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        counts = torch.bincount(shuffled * num_experts + experts, minlength=num_domains * num_experts)
        values.append(float(mutual_information(counts.view(num_domains, num_experts))))
    floor = (num_experts - 1) * (num_domains - 1) / (2 * len(labels))
    assert sum(values) / len(values) == pytest.approx(floor, rel=0.1)
    loyal = torch.where(torch.rand(labels.shape, generator=generator) < 0.5, labels, experts)  # half of the choices
    counts = torch.bincount(labels * num_experts + loyal, minlength=num_domains * num_experts)
    assert 10 * floor < float(mutual_information(counts.view(num_domains, num_experts))) < math.log(num_domains)
