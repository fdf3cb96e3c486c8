"""The sums: what shuffled labels and the bias correction are worth, that no cut matters, and that NaN is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from equipoise.errors import InputError
from equipoise.external.observe import Choices, ObservedRouter
from equipoise.functional import mutual_information
from equipoise.functional.specialization import information_bias
from equipoise.inspection.accumulator import Accumulator, Sizes

E, K, S, V = 8, 2, 16, 40


def router(experts=E, name="gate"):
    return ObservedRouter(name, nn.Identity(), experts, K, "softmax", lambda _args, _kwargs, output: output)


def accumulated(windows, *, at_a_time, micro_batch=2, experts=(E,), prefer=0.0, same=False, seed=0):
    """A accumulator of random routing; domains prefer experts of their own by ``prefer``."""
    sizes = Sizes(len(windows), windows, min(windows), S, micro_batch, seed)
    routers = [router(n, f"gate{i}") for i, n in enumerate(experts)]
    accumulator = Accumulator(routers, sizes, np.ones(V, np.int64), torch.device("cpu"))
    for number in range(math.ceil(max(windows) / at_a_time)):
        for d, n in enumerate(windows):
            first, stop = number * at_a_time, min(n, (number + 1) * at_a_time)
            if first >= stop:
                continue
            ids, seen = [], [[] for _ in routers]
            for w in range(first, stop):  # a window's routing depends on nothing but its place
                draw = torch.Generator().manual_seed(1000 * d + w)
                ids.append(torch.randint(V, (S,), generator=draw))
                for i, one in enumerate(routers):
                    z = torch.randn(S, one.num_experts, generator=draw)
                    z = z + 0.5 * torch.randn(
                        1, one.num_experts, generator=draw
                    )  # windows differ: tokens are not alone
                    if not same:
                        z[:, d] += prefer
                    seen[i].append(z)
            logits = [torch.cat(parts) for parts in seen]
            accumulator.add(d, first, torch.stack(ids), [Choices(z, z.topk(K).indices) for z in logits])
        accumulator.close_round(number)
    return accumulator


@pytest.mark.parametrize("at_a_time", [2, 4, 6])
def test_how_many_pass_at_a_time_changes_no_sum(at_a_time):
    one, other = accumulated([7, 10, 4], at_a_time=at_a_time), accumulated([7, 10, 4], at_a_time=10)
    for name, tensor in one.state.items():
        if name.startswith(("shuffled", "example")):
            continue  # drawn anew for each pass
        assert torch.allclose(tensor.double(), other.state[name].double(), rtol=1e-6), name


def test_layers_of_different_sizes_do_not_mix():
    both, small = accumulated([6, 6], at_a_time=2, experts=(4, 8)), accumulated([6, 6], at_a_time=2, experts=(4,))
    assert (both.state["counts_DLE"][:, 0, 4:] == 0).all()
    assert torch.equal(both.state["counts_DLE"][:, 0, :4], small.state["counts_DLE"][:, 0])
    assert torch.allclose(both.state["sequence_vio_DL"][:, 0], small.state["sequence_vio_DL"][:, 0])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=3), st.integers(1, 5), st.integers(0, 3))
def test_dealt_labels_keep_every_window_and_every_total(windows, at_a_time, seed):
    """Whatever the numbers of windows: labels are dealt to the equal windows, each domain's label as often."""
    state = accumulated(windows, at_a_time=at_a_time, micro_batch=1, seed=seed).state
    for shuffled_DLE in state["shuffled_RDLE"]:
        assert torch.equal(shuffled_DLE.sum(0), state["equal_DLE"].sum(0))
        assert (shuffled_DLE.sum(-1) == min(windows) * S * K).all()


def test_shuffled_labels_are_what_chance_shows():
    """Domains that are the same lie within the shuffles; domains that differ lie far beyond."""
    alike, apart = (
        accumulated([30, 30], at_a_time=4, same=True).state,
        accumulated([30, 30], at_a_time=4, prefer=1.0).state,
    )
    for state, beyond in ((alike, False), (apart, True)):
        value = float(mutual_information(state["equal_DLE"][:, 0]))
        shuffled = mutual_information(state["shuffled_RDLE"][:, :, 0])
        assert (value > 3 * float(shuffled.max())) == beyond
    naive = (E - 1) / (2 * 2 * 30 * S * K)  # what independent tokens would show
    assert float(mutual_information(alike["shuffled_RDLE"][:, :, 0]).mean()) > 1.5 * naive


def naive_information(shares):
    mean = [sum(column) / len(shares) for column in zip(*shares, strict=True)]
    return sum(p * math.log(p / m) for row in shares for p, m in zip(row, mean, strict=True) if p) / len(shares)


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_the_correction_brings_the_mean_to_the_truth(apart):
    """300 corpora whose domains' loads are known, windows scattered around them: the mean error is nearly gone."""
    draw = np.random.default_rng(0)
    truth = np.stack([np.exp(apart * np.sin(np.arange(E) + 2 * d)) for d in range(3)])
    truth /= truth.sum(1, keepdims=True)
    errors, corrected = [], []
    for _ in range(300):
        loads = np.stack([[draw.multinomial(64, draw.dirichlet(30 * truth[d])) for _ in range(12)] for d in range(3)])
        counts, squares = torch.from_numpy(loads.sum(1)), torch.from_numpy((loads**2).sum(1))
        value = float(mutual_information(counts))
        errors.append(value - naive_information(truth))
        corrected.append(value - float(information_bias(counts, squares, 12)) - naive_information(truth))
    assert np.mean(errors) > 2 * (E - 1) * (3 - 1) / (2 * 3 * 12 * 64)  # tokens of a window are not independent
    assert abs(np.mean(corrected)) < 0.1 * np.mean(errors)


def test_the_bias_of_independent_choices_is_the_known_one():
    draw, windows, size = np.random.default_rng(1), 4000, 50
    loads = draw.multinomial(size, np.full(E, 1 / E), (3, windows))
    got = information_bias(torch.from_numpy(loads.sum(1)), torch.from_numpy((loads**2).sum(1)), windows)
    assert float(got) == pytest.approx((E - 1) * (3 - 1) / (2 * 3 * windows * size), rel=0.02)


def test_memory_does_not_grow_with_text():
    sizes = [
        sum(t.numel() * t.element_size() for t in accumulated([n, n], at_a_time=8).state.values()) for n in (2, 64)
    ]
    assert sizes[0] == sizes[1]


def test_examples_are_drawn_evenly():
    """Among 64 windows, each with one token for expert 0, every window is shown about equally often."""
    shown = np.zeros(64)
    for seed in range(100):
        accumulator = Accumulator([router()], Sizes(1, [64], 64, 4, 1, seed), np.ones(V, np.int64), torch.device("cpu"))
        for first in range(0, 64, 8):
            choices = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]]).repeat(8, 1)
            accumulator.add(0, first, torch.zeros(8, 4, dtype=torch.long), [Choices(torch.zeros(32, E), choices)])
        place = int(accumulator.state["example_place_LEJ"][0, 0, 0])
        assert place & 0xFFFFFF == 0
        shown[place >> 24] += 1
    assert shown.sum() == 100 and shown.max() <= 8 and (shown > 0).sum() > 40


def test_logits_that_are_not_finite_are_named():
    accumulator = Accumulator([router(name="model.layers.3.gate")], Sizes(1, [1], 1, 4, 1, 0), np.ones(V, np.int64),
                  torch.device("cpu"))  # fmt: skip
    z = torch.zeros(4, E)
    z[1, 2] = torch.nan
    with pytest.raises(InputError, match=r"model\.layers\.3\.gate"):
        accumulator.add(0, 0, torch.zeros(1, 4, dtype=torch.long), [Choices(z, torch.zeros(4, K, dtype=torch.long))])


def test_a_choice_that_is_none_is_in_no_sum():
    """Of tokens that use fewer than K experts: against loops over their choices."""
    sizes = Sizes(2, [3, 3], 3, S, 2, 0)
    one = ObservedRouter("gate", nn.Identity(), E, K, "softmax", lambda _args, _kwargs, output: output, drops=True)
    accumulator = Accumulator([one], sizes, np.ones(V, np.int64), torch.device("cpu"), against=True)
    counts, pairs, of_ids, score, shared = [[0] * E for _ in range(2)], [[0] * E for _ in range(E)], {}, [0.0, 0.0], 0
    for d in range(2):
        draw = torch.Generator().manual_seed(d)
        ids_BS, z = torch.randint(V, (3, S), generator=draw), torch.randn(3 * S, E, generator=draw)
        other = (
            torch.randn(3 * S, E, generator=draw)
            .topk(K)
            .indices.masked_fill(torch.rand(3 * S, K, generator=draw) < 0.3, E)
        )
        ids_TK = z.topk(K).indices.masked_fill(torch.rand(3 * S, K, generator=draw) < 0.4, E)
        accumulator.add(d, 0, ids_BS, [Choices(z, ids_TK)], [Choices(z, other)])
        probs = z.softmax(dim=1)
        for t, (token, row) in enumerate(zip(ids_BS.flatten().tolist(), ids_TK.tolist(), strict=True)):
            kept = [e for e in row if e < E]
            shared += len(set(kept) & set(other[t].tolist()))
            score[d] += sum(float(probs[t, e]) for e in kept)
            for e in kept:
                counts[d][e] += 1
                of_ids[token, e] = of_ids.get((token, e), 0) + 1
                for f in kept:
                    pairs[e][f] += 1
            if d == 0 and t < S:
                passage = accumulator.state["passages_NCLK"][0, t, 0].tolist()
                assert [e for e in passage if e >= 0] == sorted(kept, key=lambda e: -float(probs[t, e]))
    accumulator.close_round(0)
    state = accumulator.state
    assert state["counts_DLE"][:, 0].tolist() == counts
    assert state["pairs_LEE"][0].tolist() == pairs
    assert state["score_DL"][:, 0].tolist() == pytest.approx(score, rel=1e-5)
    assert int(state["shared_DL"].sum()) == shared
    table = state["ids_LME"][0].view(-1, E)
    for slot, token in enumerate(accumulator.tracked_M.tolist()):
        assert table[slot].tolist() == [of_ids.get((token, e), 0) for e in range(E)]
