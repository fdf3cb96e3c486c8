"""Top-p against loops over Python floats: the fewest experts, the best first, that have this much probability."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise import MoE, Router
from equipoise.errors import ConfigError
from equipoise.functional.routing import GATES, count_choices, gate_probs, gate_scores, route


def naive(z: list[float], gate: str, bias: list[float], top_k: int, top_p: float) -> list[int]:
    """The experts of a token in the order of (score + bias)."""
    row = torch.tensor([z], dtype=torch.float64)
    scores, probs = gate_scores(row, gate)[0].tolist(), gate_probs(row, gate)[0].tolist()
    order = sorted(range(len(z)), key=lambda e: -(scores[e] + bias[e]))[:top_k]
    kept: list[int] = []
    for e in order:
        if sum(probs[other] for other in kept) >= top_p:
            break
        kept.append(e)
    return kept


@given(
    st.integers(0, 12), st.integers(1, 7), st.sampled_from(GATES), st.floats(0.05, 1.0), st.booleans(), st.booleans(),
    st.integers(0, 2**31), st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_choice_and_weights_are_the_loop(tokens, experts, gate, top_p, normalize, biased, seed, data):
    top_k = data.draw(st.integers(1, experts))
    generator = torch.Generator().manual_seed(seed)
    z = 3 * torch.randn(tokens, experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(experts, generator=generator, dtype=torch.float64) * 0.3 * biased
    mask = torch.rand(tokens, generator=generator) > 0.3
    got = route(
        z, top_k, gate=gate, selection_bias_E=bias, top_p=top_p, normalize=normalize, scale=2.0, token_mask_T=mask
    )
    counts = [0] * experts
    for t, row in enumerate(z.tolist()):
        want = naive(row, gate, bias.tolist(), top_k, top_p)
        scores = gate_scores(z[t : t + 1], gate)[0]
        share = scores[want].sum() if normalize else 1.0
        assert got.expert_ids_TK[t].tolist() == want + [experts] * (top_k - len(want))
        torch.testing.assert_close(got.weights_TK[t, : len(want)], 2 * scores[want] / share)
        assert not got.weights_TK[t, len(want) :].any()
        for e in want if mask[t] else []:
            counts[e] += 1
    assert got.counts_E.tolist() == counts == count_choices(got.expert_ids_TK, experts, mask)[0].tolist()


def test_the_ends():
    z = torch.tensor([[3.0, 2.0, 1.0, 0.0]])  # p = 0.64, 0.24, 0.09, 0.03
    assert route(z, 4, top_p=1e-6).expert_ids_TK.tolist() == [[0, 4, 4, 4]], "never none"
    assert route(z, 4, top_p=1.0).expert_ids_TK.tolist() == [[0, 1, 2, 3]]
    assert route(z, 2, top_p=1.0).expert_ids_TK.tolist() == [[0, 1]], "K at most"
    assert torch.equal(route(z, 3, top_p=1.0).weights_TK, route(z, 3).weights_TK)


def test_a_token_that_may_choose_few_uses_these():
    z = torch.tensor([[0.0, float("-inf"), 1.0, float("-inf")]])
    assert route(z, 3, top_p=0.999).expert_ids_TK.tolist() == [[2, 0, 4]]


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.0001, float("nan")])
def test_a_probability_outside_is_refused(top_p):
    for make in (lambda: Router(8, 4, 2, top_p=top_p), lambda: route(torch.zeros(1, 4), 2, top_p=top_p)):
        with pytest.raises(ConfigError, match="top_p above 0 and at most 1"):
            make()


def test_one_expert_still_teaches_the_router():
    """A share of itself is 1 whatever the logits; so weights are probabilities, unless someone asks otherwise."""
    assert not Router(8, 4, 3, top_p=0.6).normalize and Router(8, 4, 3).normalize
    assert Router(8, 4, 3, top_p=0.6, normalize=True).normalize
    for normalize in (False, True):
        torch.manual_seed(0)
        layer = MoE(8, 16, 4, 3, top_p=1e-6, normalize=normalize)  # every token has one
        layer(torch.randn(20, 8)).square().sum().backward()
        assert layer.gate.weight.grad is not None
        assert bool(layer.gate.weight.grad.abs().max() > 1e-6) == (not normalize)


def test_the_layer_is_the_sum_over_the_experts_that_a_token_has():
    torch.manual_seed(0)
    layer = MoE(8, 16, 6, 4, top_p=0.5).double()
    x = torch.randn(30, 8, dtype=torch.float64)
    routing = layer.gate(x)
    used = (routing.expert_ids_TK < 6).sum(dim=1)
    assert used.min() == 1 and used.max() > 2, "the case has tokens of several kinds"
    rows = []
    for t in range(30):
        k = int(used[t])
        ids, weights = routing.expert_ids_TK[t : t + 1, :k], routing.weights_TK[t : t + 1, :k]
        rows.append(layer.experts(x[t : t + 1], ids, weights))
    torch.testing.assert_close(layer(x), torch.cat(rows))
