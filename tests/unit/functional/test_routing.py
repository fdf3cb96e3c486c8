"""Routing against plain loops over Python floats, at the edges of the number formats, and against real routers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, InputError
from equipoise.functional.routing import (
    GATES,
    PLACES,
    choose,
    count_choices,
    gate_log_scores,
    gate_probs,
    gate_scores,
    gate_slope,
    route,
    select_experts,
    weigh,
)

quick = settings(max_examples=60, deadline=None)
gates = pytest.mark.parametrize("gate", GATES)


def log1pexp(z: float) -> float:
    return z + math.log1p(math.exp(-z)) if z > 0 else math.log1p(math.exp(z))


def log_score(z: float, gate: str) -> float:
    """log g(z), g un-normalised, in Python floats; log softplus(z) is z far below zero, where softplus underflows."""
    if gate == "softmax":
        return z
    if gate == "sigmoid":
        return -log1pexp(-z)
    return 0.5 * (math.log(log1pexp(z)) if z > -700 else z)


def scores_of(row: list[float], gate: str) -> list[float]:
    if gate == "softmax":
        top = max(row)
        total = math.fsum(math.exp(z - top) for z in row)
        return [math.exp(z - top) / total for z in row]
    return [math.exp(log_score(z, gate)) for z in row]


def chosen_by(row: list[float], gate: str, bias: list[float] | None, place: str) -> list[float]:
    if not bias:
        return scores_of(row, gate)
    if place == "logits":
        return scores_of([z + b for z, b in zip(row, bias, strict=True)], gate)
    pairs = zip(scores_of(row, gate), bias, strict=True)
    return [s * (1 + b) if place == "multiply" else s + b for s, b in pairs]


def naive_route(rows, top_k, gate, bias, place, num_groups, top_groups, normalize, scale):
    """DeepSeek-V3's router as its paper says it, one token at a time: (ids, weights)."""
    ids, weights = [], []
    for row in rows:
        score = scores_of(row, gate)
        by = chosen_by(row, gate, bias, place)
        size = len(row) // num_groups
        if num_groups > 1:
            worth = [sum(sorted(by[g * size : (g + 1) * size])[-2:]) for g in range(num_groups)]
            best = sorted(range(num_groups), key=lambda g: -worth[g])[:top_groups]
            open_to = [e for e in range(len(row)) if e // size in best]
        else:
            open_to = list(range(len(row)))
        chosen = sorted(open_to, key=lambda e: -by[e])[:top_k]
        total = math.fsum(score[e] for e in chosen) if normalize else 1.0
        ids.append(chosen)
        weights.append([scale * score[e] / total for e in chosen])
    return ids, weights


@st.composite
def problems(draw):
    num_groups, size = draw(st.sampled_from([(1, 1), (1, 2), (1, 7), (1, 16), (2, 4), (4, 1), (4, 2), (3, 3), (8, 4)]))
    top_groups = draw(st.integers(1, num_groups))
    return {
        "logits": torch.randn(
            draw(st.integers(0, 6)),
            num_groups * size,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(draw(st.integers(0, 2**31))),
        )
        * draw(st.sampled_from([0.1, 1.0, 5.0])),
        "top_k": draw(st.integers(1, top_groups * size)),
        "gate": draw(st.sampled_from(GATES)),
        "num_groups": num_groups,
        "top_groups": top_groups,
        "normalize": draw(st.booleans()),
        "scale": draw(st.sampled_from([1.0, 2.5])),
        "biased": draw(st.booleans()),
        "bias_place": draw(st.sampled_from(PLACES)),
        "seed": draw(st.integers(0, 2**31)),
    }


def bias_of(p) -> torch.Tensor | None:
    generator = torch.Generator().manual_seed(p["seed"])
    return torch.randn(p["logits"].shape[1], generator=generator, dtype=torch.float64) if p["biased"] else None


def routed(p, logits=None, bias=None, **more):
    names = ("gate", "num_groups", "top_groups", "normalize", "scale", "bias_place")
    logits = p["logits"] if logits is None else logits
    return route(logits, p["top_k"], selection_bias_E=bias, **{name: p[name] for name in names}, **more)


@quick
@given(problems())
def test_route_is_the_loop_over_tokens(p):
    bias = bias_of(p)
    ids, weights = naive_route(
        p["logits"].tolist(), p["top_k"], p["gate"], None if bias is None else bias.tolist(),
        p["bias_place"], p["num_groups"], p["top_groups"], p["normalize"], p["scale"],
    )  # fmt: skip
    got = routed(p, bias=bias)
    shape = (p["logits"].shape[0], p["top_k"])
    assert got.expert_ids_TK.shape == got.weights_TK.shape == shape
    assert got.expert_ids_TK.dtype == got.counts_E.dtype == torch.int64
    assert got.expert_ids_TK.tolist() == ids
    torch.testing.assert_close(
        got.weights_TK, torch.tensor(weights, dtype=torch.float64).reshape(shape), rtol=1e-9, atol=0
    )
    flat = [e for row in ids for e in row]
    assert got.counts_E.tolist() == [flat.count(e) for e in range(p["logits"].shape[1])]
    assert got.logits_TE is p["logits"]


@quick
@given(problems())
def test_numbering_of_tokens_and_experts_does_not_matter(p):
    bias, plain = bias_of(p), p["logits"]
    generator = torch.Generator().manual_seed(p["seed"])
    groups = torch.randperm(p["num_groups"], generator=generator)  # whole groups move, and experts inside them
    within = torch.randperm(plain.shape[1] // p["num_groups"], generator=generator)
    experts = (groups.unsqueeze(1) * len(within) + within).reshape(-1)
    tokens = torch.randperm(plain.shape[0], generator=generator)
    before = routed(p, bias=bias)
    after = routed(p, plain[tokens][:, experts], None if bias is None else bias[experts])
    assert torch.equal(experts[after.expert_ids_TK], before.expert_ids_TK[tokens])
    torch.testing.assert_close(after.weights_TK, before.weights_TK[tokens], rtol=1e-12, atol=0)
    assert torch.equal(after.counts_E, before.counts_E[experts])


@quick
@given(problems())
def test_bias_moves_ids_but_not_the_formula_of_weights_nor_gradients(p):
    bias = torch.randn(p["logits"].shape[1], generator=torch.Generator().manual_seed(p["seed"]), dtype=torch.float64)
    bias.requires_grad_()
    logits = p["logits"].clone().requires_grad_()
    got = routed(p, logits, bias)
    scores = gate_scores(logits, p["gate"]).gather(1, got.expert_ids_TK)
    want = scores / scores.sum(dim=1, keepdim=True) if p["normalize"] else scores
    torch.testing.assert_close(got.weights_TK, p["scale"] * want)
    if got.weights_TK.numel() == 0:
        return
    direction = torch.randn_like(want)
    (through,) = torch.autograd.grad((got.weights_TK * direction).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((p["scale"] * want * direction).sum(), logits)
    torch.testing.assert_close(through, expected, rtol=1e-7, atol=1e-10)
    assert not torch.autograd.grad(got.weights_TK.sum(), bias, allow_unused=True)[0]


def test_a_bias_can_make_any_expert_chosen():
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    for expert in range(8):
        bias = torch.zeros(8).index_fill_(0, torch.tensor(expert), 10.0)
        for gate in GATES:
            assert int(route(logits, 2, gate=gate, selection_bias_E=bias).counts_E[expert]) == 50


@quick
@given(problems())
def test_a_mask_removes_exactly_the_counts_of_its_tokens(p):
    bias = bias_of(p)
    keep = torch.rand(p["logits"].shape[0], generator=torch.Generator().manual_seed(p["seed"])) > 0.5
    whole, masked = routed(p, bias=bias), routed(p, bias=bias, token_mask_T=keep)
    assert torch.equal(masked.expert_ids_TK, whole.expert_ids_TK)
    assert torch.equal(masked.weights_TK, whole.weights_TK)
    assert torch.equal(masked.counts_E, routed(p, p["logits"][keep], bias).counts_E)
    assert torch.equal(masked.counts_E, routed(p, bias=bias, token_mask_T=keep.long()).counts_E)
    assert int(routed(p, bias=bias, token_mask_T=torch.zeros_like(keep)).counts_E.sum()) == 0


@quick
@given(st.integers(1, 5), st.integers(0, 6), st.integers(1, 9), st.data())
def test_counts_of_sequences_are_those_of_a_loop(num_sequences, length, num_experts, data):
    top_k = data.draw(st.integers(1, num_experts))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    ids = torch.rand(num_sequences * length, num_experts, generator=generator).topk(top_k).indices
    ids = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.3, num_experts)  # no choice
    mask = torch.rand(num_sequences * length, generator=generator) > 0.3
    want = [[0] * num_experts for _ in range(num_sequences)]
    for token, row in enumerate(ids.tolist()):
        for expert in row if mask[token] else []:
            if expert < num_experts:
                want[token // length][expert] += 1
    got = count_choices(ids, num_experts, mask, num_sequences)
    assert got.dtype == torch.int64
    assert got.tolist() == want


@pytest.mark.parametrize("kind", [torch.int64, torch.uint8, torch.int32])
def test_a_mask_that_numbers_sequences_counts_each_token_once(kind):
    """Packed batches have 1, 2, 3 for their sequences and 0 for padding."""
    z_TE, mask_T = torch.randn(6, 4), torch.tensor([1, 1, 2, 3, 0, 0])
    want_E, got_E = (route(z_TE, 2, token_mask_T=mask).counts_E for mask in (mask_T > 0, mask_T.to(kind)))
    assert torch.equal(got_E, want_E) and int(got_E.sum()) == 8


def test_counts_are_exact_above_two_to_the_24():
    tokens = 2**24 + 3  # where fp32 stops counting
    assert count_choices(torch.ones(1, 1, dtype=torch.int64).expand(tokens, 1), 2).tolist() == [[0, tokens]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", [0.0, -30.0, -110.0, -1e4, 30.0, 1e4])
@gates
def test_normalised_weights_sum_to_the_scale_at_any_level(gate, level, dtype):
    """Scores that underflow or saturate still divide: a naive sum of sigmoids at -110 is 0 in fp32."""
    logits = (level + torch.randn(20, 8, generator=torch.Generator().manual_seed(1))).to(dtype).requires_grad_()
    routing = route(logits, 3, gate=gate, scale=2.5)
    assert routing.weights_TK.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(
        routing.weights_TK.sum(dim=1).double(), torch.full((20,), 2.5).double(), rtol=1e-6, atol=0
    )
    assert (routing.weights_TK > 0).all()
    routing.weights_TK.square().sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    probs = gate_probs(logits.detach(), gate)
    torch.testing.assert_close(probs.sum(dim=1).double(), torch.ones(20).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [-1e4, -120.0, -104.5, -94.0, -41.0, -39.0, -20.0, 0.0, 25.0, 1e4])
@gates
def test_scores_and_their_gradients_are_finite_and_right_at_any_level(gate, level, dtype):
    logits = torch.tensor([[level, level - 0.5, level + 0.5]], dtype=dtype, requires_grad=True)
    scores = gate_scores(logits, gate)
    want = scores_of(logits.tolist()[0], gate)
    torch.testing.assert_close(scores, torch.tensor([want], dtype=dtype), rtol=3e-6, atol=1e-37)
    logs = gate_log_scores(logits, gate)
    expected = torch.tensor([[log_score(z, gate) for z in logits.tolist()[0]]], dtype=dtype)
    tiny = 3e-9 if dtype == torch.float64 else 1e-6  # torch's softplus is z itself above 20: 2e-9
    torch.testing.assert_close(logs, expected, rtol=1e-6 if dtype == torch.float32 else 1e-9, atol=tiny)
    weights = route(logits, 3, gate=gate, normalize=False).weights_TK
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    assert gradient.isfinite().all()
    (slope,) = torch.autograd.grad(logs.sum(), logits)
    torch.testing.assert_close(slope, gate_slope(logits.detach(), gate))


@quick
@given(st.floats(-600, 18), st.sampled_from(GATES))
def test_slope_is_the_numerical_derivative_of_the_log_score(z, gate):
    step = 1e-5
    numerical = (log_score(z + step, gate) - log_score(z - step, gate)) / (2 * step)
    got = float(gate_slope(torch.tensor([z], dtype=torch.float64), gate))
    assert got == pytest.approx(numerical, rel=1e-6, abs=1e-9 * max(1.0, abs(z)))


@gates
def test_probabilities_are_scores_over_their_sum(gate):
    logits = 3 * torch.randn(30, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    scores = gate_scores(logits, gate)
    torch.testing.assert_close(gate_probs(logits, gate), scores / scores.sum(dim=1, keepdim=True))
    if gate == "softmax":
        torch.testing.assert_close(scores, logits.softmax(dim=1))


@pytest.mark.parametrize("normalize", [True, False])
@gates
def test_gradients_of_weights_and_scores(gate, normalize):
    logits = torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda z: route(z, 3, gate=gate, normalize=normalize, scale=1.7).weights_TK, (logits,)
    )
    assert torch.autograd.gradcheck(lambda z: gate_scores(z, gate), (logits,))
    assert torch.autograd.gradcheck(lambda z: gate_probs(z, gate), (logits,))
    assert torch.autograd.gradcheck(lambda z: gate_log_scores(z, gate), (logits,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@gates
def test_ties_break_as_in_topk(gate, dtype):
    logits = (torch.randint(-2, 3, (200, 16), generator=torch.Generator().manual_seed(4)) / 2).to(dtype)
    assert torch.equal(route(logits, 5, gate=gate).expert_ids_TK, logits.topk(5).indices)
    biased = route(logits, 5, gate=gate, selection_bias_E=torch.zeros(16)).expert_ids_TK
    assert torch.equal(biased, gate_scores(logits, gate).topk(5).indices)


@gates
def test_half_precision_logits_are_routed_as_their_fp32_values(gate):
    logits = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))
    for dtype in (torch.bfloat16, torch.float16):
        low = route(logits.to(dtype), 2, gate=gate)
        wide = route(logits.to(dtype).float(), 2, gate=gate)
        torch.testing.assert_close(low.weights_TK.sort().values, wide.weights_TK.sort().values, rtol=0, atol=0)
        assert low.weights_TK.dtype == torch.float32


@gates
def test_strides_do_not_matter(gate):
    logits = torch.randn(8, 40, 2, generator=torch.Generator().manual_seed(6))[..., 0].t()
    assert not logits.is_contiguous()
    bias = torch.randn(16)[::2]
    for num_groups, top_groups in ((1, 1), (4, 2)):
        left, right = (
            route(z, 2, gate=gate, selection_bias_E=b, num_groups=num_groups, top_groups=top_groups)
            for z, b in ((logits, bias), (logits.contiguous(), bias.contiguous()))
        )
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)


@gates
@pytest.mark.parametrize("tokens", [0, 1, 3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (4, 4), (4, 1)])
def test_smallest_sizes(tokens, num_experts, top_k, gate):
    routing = route(torch.randn(tokens, num_experts), top_k, gate=gate)
    assert int(routing.counts_E.sum()) == tokens * top_k
    if top_k == num_experts:
        assert routing.counts_E.tolist() == [tokens] * num_experts
    torch.testing.assert_close(routing.weights_TK.sum(dim=1), torch.ones(tokens))


def test_groups_of_one_expert_are_no_groups():
    scores = torch.randn(40, 6, generator=torch.Generator().manual_seed(7))
    assert torch.equal(select_experts(scores, 2, num_groups=6, top_groups=6), scores.topk(2).indices)
    assert torch.equal(select_experts(scores, 2, num_groups=6, top_groups=2), scores.topk(2).indices)


def test_negative_scores_never_let_a_closed_group_in():
    """A closed group must not win with 0 against open scores that a bias made negative."""
    scores = -1 - torch.rand(100, 8, generator=torch.Generator().manual_seed(8))
    ids = select_experts(scores, 2, num_groups=4, top_groups=1)
    assert (ids[:, 0] // 2 == ids[:, 1] // 2).all()


def test_no_graph_break_and_the_same_bits_in_a_captured_graph():
    logits = torch.randn(32, 8, generator=torch.Generator().manual_seed(9))
    bias, mask = torch.randn(8), torch.rand(32) > 0.5

    def whole(z):
        return route(z, 2, gate="sigmoid", selection_bias_E=bias, num_groups=4, top_groups=2, token_mask_T=mask)

    captured = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for one, other in zip(captured(logits), whole(logits), strict=True):
        assert torch.equal(one, other)


REFUSED = [
    (ConfigError, "top_k", {"top_k": 5}),
    (ConfigError, "top_k", {"top_k": 0}),
    (ConfigError, "num_groups", {"num_groups": 3}),
    (ConfigError, "num_groups", {"num_groups": 0}),
    (ConfigError, "top_groups", {"num_groups": 2, "top_groups": 3}),
    (ConfigError, "top_groups", {"num_groups": 2, "top_groups": 0}),
    (ConfigError, "chosen groups", {"num_groups": 2, "top_groups": 1, "top_k": 3}),
    (ConfigError, "'sigmoid'", {"gate": "sigmoyd"}),
    (InputError, "token_mask_T", {"token_mask_T": torch.ones(7, dtype=torch.bool)}),
    (InputError, "token_mask_T", {"token_mask_T": torch.ones(6, 1, dtype=torch.bool)}),
    (InputError, "boolean", {"token_mask_T": torch.zeros(6)}),
    (InputError, "selection_bias_E", {"selection_bias_E": torch.zeros(1)}),
]


@pytest.mark.parametrize(("error", "word", "arguments"), REFUSED)
def test_what_cannot_be_routed_is_refused_in_three_parts(error, word, arguments):
    with pytest.raises(error) as caught:
        route(torch.zeros(6, 4), **{"top_k": 1, **arguments})
    assert word in str(caught.value)
    assert caught.value.expected
    assert caught.value.got
    assert caught.value.do


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@gates
def test_logits_that_are_not_finite_are_refused(gate, bad):
    logits = torch.zeros(5, 4)
    logits[1, 2] = logits[3, 0] = bad
    with pytest.raises(InputError, match="2 of 5 tokens"):
        route(logits, 1, gate=gate)
    with pytest.raises(InputError, match="2 of 5 tokens"):
        route(torch.cat([logits, logits.clamp(-1, 1).nan_to_num()]).narrow(0, 0, 5).to(torch.bfloat16), 1, gate=gate)


def test_opposite_infinities_and_huge_finite_logits_are_told_apart():
    with pytest.raises(InputError, match="1 of 1"):
        route(torch.tensor([[math.inf, -math.inf]]), 1)
    assert route(torch.full((4, 3), 1e308, dtype=torch.float64), 1).counts_E.sum() == 4


@pytest.mark.parametrize("shape", [(3,), (2, 3, 4)])
def test_logits_of_another_rank_are_refused(shape):
    with pytest.raises(InputError, match="T, E"):
        route(torch.zeros(shape), 1)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [True, False])
def test_weights_are_shared_by_the_choices_that_are_one(gate, normalize):
    """And the logits' gradient is that of these choices alone, also where a token has none."""
    logits = (3 * torch.randn(40, 6, dtype=torch.float64)).requires_grad_()
    ids = logits.detach().topk(4).indices.masked_fill(torch.rand(40, 4) < 0.4, 6)
    ids[3] = 6
    assert (ids[:, 0] == 6).any() and (ids < 6).all(dim=1).any()
    form = {"gate": gate, "normalize": normalize, "scale": 1.5}
    weights, _ = weigh(logits, ids, **form, drops=True)
    rows = []
    for z, row in zip(logits, ids.tolist(), strict=True):
        kept = [e for e in row if e < 6]
        found = iter(weigh(z.unsqueeze(0), torch.tensor([kept]), **form)[0][0] if kept else [])
        rows.append(torch.stack([next(found) if e < 6 else torch.zeros((), dtype=z.dtype) for e in row]))
    expected, direction = torch.stack(rows), torch.randn(40, 4, dtype=torch.float64)
    torch.testing.assert_close(weights, expected)
    got, wanted = (torch.autograd.grad((w * direction).sum(), logits)[0] for w in (weights, expected))
    torch.testing.assert_close(got, wanted)
    assert not weights[ids == 6].any()
    assert not got[3].any()


def test_choose_is_route_without_counting():
    logits = torch.randn(9, 8)
    keywords = {"gate": "sigmoid", "num_groups": 2, "top_groups": 1, "normalize": True, "scale": 2.0}
    weights, ids, _ = choose(logits, 2, selection_bias=None, **keywords)
    whole = route(logits, 2, **keywords)
    assert torch.equal(weights, whole.weights_TK)
    assert torch.equal(ids, whole.expert_ids_TK)
