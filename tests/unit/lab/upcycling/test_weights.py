"""Experts from a feed-forward: what they compute together, against a loop over tokens in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.lab.upcycling.weights import FeedForward, Shape, make_experts, make_router, split_neurons

DIM, HIDDEN, TOKENS = 6, 12, 9


def ffn_of(seed: int = 0) -> FeedForward:
    draw = torch.Generator().manual_seed(seed)
    shapes = ((HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN))
    return FeedForward(*(torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes))


def apply(ffn: FeedForward, x_TD: torch.Tensor) -> torch.Tensor:
    return (F.silu(x_TD @ ffn.gate_HD.T) * (x_TD @ ffn.up_HD.T)) @ ffn.down_DH.T


def by_loop(experts, router_ED, x_TD, top_k):
    """Token by token, expert by expert."""
    gate_up_EFD, down_EDF = experts
    y_TD = torch.zeros_like(x_TD)
    for t, x_D in enumerate(x_TD):
        probs_E = (router_ED.double() @ x_D).softmax(dim=0)
        weights_K, ids_K = probs_E.topk(top_k)
        for weight, e in zip(weights_K / weights_K.sum(), ids_K.tolist(), strict=True):
            gate_FD, up_FD = gate_up_EFD[e].chunk(2)
            y_TD[t] += weight * (down_EDF[e] @ (F.silu(gate_FD @ x_D) * (up_FD @ x_D)))
    return y_TD


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(granularity=st.sampled_from([1, 2, 3, 4, 6]), groups=st.integers(1, 3), more=st.integers(0, 2))
def test_whole_groups_compute_the_feed_forward(granularity, groups, more):
    shape = Shape(granularity * (groups + more), granularity * groups, granularity)
    assert shape.exact
    ffn, x_TD = ffn_of(), tokens()
    router_ED = make_router(DIM, shape, std=1.0, generator=torch.Generator().manual_seed(2))
    y_TD = by_loop(make_experts(ffn, shape), router_ED, x_TD, shape.top_k)
    torch.testing.assert_close(y_TD, apply(ffn, x_TD), rtol=1e-12, atol=1e-12)


def test_parts_sum_to_the_whole():
    ffn, x_TD = ffn_of(), tokens()
    parts = split_neurons(ffn, 4)
    torch.testing.assert_close(sum(apply(part, x_TD) for part in parts), apply(ffn, x_TD), rtol=1e-12, atol=1e-12)
    assert torch.cat([part.up_HD for part in parts]).equal(ffn.up_HD)


def test_fewer_parts_than_there_are_keep_what_each_part_says():
    """With equal weights, K of G parts: the sum of those that run, neither shrunk nor blown up; no scale is closer."""
    ffn, x_TD = ffn_of(), torch.randn(4000, DIM, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    shape = Shape(6, 2, 6)
    experts = make_experts(ffn, shape)
    parts = split_neurons(ffn, 6)
    whole_TD, two_TD = apply(ffn, x_TD), apply(parts[1], x_TD) + apply(parts[4], x_TD)
    ran_TD = sum(0.5 * apply(FeedForward(*experts.gate_up_EFD[e].chunk(2), experts.down_EDF[e]), x_TD) for e in (1, 4))
    torch.testing.assert_close(ran_TD, two_TD, rtol=1e-12, atol=1e-12)
    best = (whole_TD * two_TD).sum() / two_TD.square().sum()  # least squares, over the scale
    errors = [(whole_TD - scale * two_TD).square().mean() for scale in (1.0, 3.0, best)]
    assert errors[0] < errors[1] and errors[0] < 1.3 * errors[2]  # 3 = G / K would keep the mean, not the output


def test_noise_is_relative_and_of_each_expert_its_own():
    shape, ffn = (
        Shape(4, 2, 1),
        FeedForward(*(torch.randn(400, 300) * scale for scale in (1.0, 5.0)), torch.ones(300, 400)),
    )
    experts = make_experts(ffn, shape, noise=0.1, generator=torch.Generator().manual_seed(0))
    for rows, scale in ((slice(0, 400), 1.0), (slice(400, 800), 5.0)):
        off = experts.gate_up_EFD[:, rows] - torch.cat(ffn[:2])[rows]
        assert off.std().item() == pytest.approx(0.1 * scale, rel=0.02)
    assert (experts.down_EDF - ffn.down_DH).std().item() == pytest.approx(0.1, rel=0.02)
    flat = (experts.gate_up_EFD - torch.cat(ffn[:2])).flatten(1)
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.02
    again = make_experts(ffn, shape, noise=0.1, generator=torch.Generator().manual_seed(0))
    assert again.gate_up_EFD.equal(experts.gate_up_EFD)


def test_routers():
    draw = torch.Generator().manual_seed(0)
    rows_ED = make_router(500, Shape(6, 2, 2), std=0.02, generator=draw)
    assert rows_ED.std().item() == pytest.approx(0.02, rel=0.05)
    assert rows_ED[0::2].equal(rows_ED[1::2]) and not rows_ED[0].equal(rows_ED[2])
    assert len(torch.unique(make_router(8, Shape(6, 2, 3), std=1.0), dim=0)) == 6  # K below G: each its own


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({"experts": 0}, "experts of 1 or more"),
        ({"experts": 4, "top_k": 5}, "lower top_k"),
        ({"experts": 8, "granularity": 3}, "take 6 experts"),
        ({"experts": 8, "top_k": 3, "granularity": 2}, "take top_k = 2"),
    ],
)
def test_shapes_that_do_not_fit(shape, said):
    with pytest.raises(ConfigError, match=said):
        Shape(**shape)
