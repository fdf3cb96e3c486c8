"""The router's kernels against float64 and plain PyTorch: run by test_interpreted.py, or as it is on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from equipoise.autograd.spec import LossTerm, StatsSpec
from equipoise.autograd.statistics import measure
from equipoise.autograd.token_layout import TokenLayout
from equipoise.functional.routing import (
    GATES,
    PLACES,
    choose,
    count_choices,
    gate_log_scores,
    gate_probs,
    gate_scores,
)
from equipoise.kernels import (
    INTERPRETED,
    STATISTICS,
    Chosen,
    RouterForm,
    choose_and_count,
    fits,
    gate_fits,
    gate_logits,
    router_gradient,
    summarize,
)

DEVICE = "cpu" if INTERPRETED else "cuda"
EXAMPLES = settings(deadline=None, max_examples=10 if INTERPRETED else 200, derandomize=True)


@st.composite
def cases(draw) -> dict:
    """Logits (T, E) with T of no particular multiple, some skewed to one expert, some rounded until they tie."""
    num_experts, sequences, length = draw(st.integers(1, 40)), draw(st.integers(1, 3)), draw(st.integers(1, 30))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    z_TE = torch.randn(sequences * length, num_experts, generator=generator) * draw(st.sampled_from([0.1, 2.0, 30.0]))
    if draw(st.booleans()):
        z_TE[:, draw(st.integers(0, num_experts - 1))] += 40  # one expert takes all
    if draw(st.booleans()):
        z_TE = z_TE.round()
    mask_T = None
    if draw(st.booleans()):
        mask_T = torch.rand(len(z_TE), generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    bias_E = torch.randn(num_experts, generator=generator).to(DEVICE) if draw(st.booleans()) else None
    normalize, gate = draw(st.booleans()), draw(st.sampled_from(GATES))
    top_k = draw(st.integers(1, min(8, num_experts)))
    form = RouterForm(top_k, gate, normalize, draw(st.sampled_from([1.0, 2.5])))
    mask_T = None if mask_T is None else mask_T.to(DEVICE)
    found = {"z": z_TE.to(DEVICE), "form": form, "sequences": sequences, "mask": mask_T, "bias": bias_E}
    return found | {"generator": generator, "place": draw(st.sampled_from(PLACES))}


def run(case: dict, **wanted: bool) -> Chosen:
    return choose_and_count(
        case["z"],
        case["form"],
        num_sequences=case["sequences"],
        selection_bias_E=case["bias"],
        bias_place=case["place"],
        token_mask_T=case["mask"],
        **wanted,
    )


def selected_by(case: dict) -> Tensor:
    """What the choice is made by, in fp32 as the kernel reckons: without a bias every gate grows with its logit."""
    if case["bias"] is None or case["place"] == "logits":
        return case["z"] + (0.0 if case["bias"] is None else case["bias"])
    scores_TE = gate_scores(case["z"], case["form"].gate)
    return scores_TE * (1 + case["bias"]) if case["place"] == "multiply" else scores_TE + case["bias"]


@given(cases())
@EXAMPLES
def test_chooses_the_best_and_of_equal_ones_the_first(case):
    score_TE, ids_TK = selected_by(case), run(case).ids_TK
    top_k = case["form"].top_k
    if case["bias"] is None:  # no arithmetic before the choice: exactly the stable order
        assert torch.equal(ids_TK, score_TE.argsort(dim=-1, descending=True, stable=True)[:, :top_k])
        return
    got, best = score_TE.gather(1, ids_TK), score_TE.topk(top_k).values
    torch.testing.assert_close(got.sort(descending=True).values, best, rtol=1e-6, atol=1e-6)
    assert all(len(set(row)) == top_k for row in ids_TK.tolist())


@given(cases())
@EXAMPLES
def test_weights_counts_and_sums_are_those_of_plain_float64(case):
    (top_k, gate, normalize, scale), z_TE, mask_T = case["form"], case["z"].double(), case["mask"]
    found, sequences = run(case, plain=True, lse=True), case["sequences"]
    ids_TK, num_experts = found.ids_TK, z_TE.shape[1]
    scores_TK = gate_scores(z_TE, gate).gather(1, ids_TK)
    if normalize:
        scores_TK = gate_log_scores(z_TE.gather(1, ids_TK), gate).softmax(dim=1)
    torch.testing.assert_close(found.weights_TK.double(), scale * scores_TK, rtol=2e-6, atol=1e-9)
    assert torch.equal(found.counts_BE, count_choices(ids_TK, num_experts, mask_T, sequences))
    plain_TK = case["z"].argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    assert torch.equal(found.plain_BE, count_choices(plain_TK, num_experts, mask_T, sequences))
    real_T1 = torch.ones(len(z_TE), 1, device=DEVICE) if mask_T is None else mask_T.unsqueeze(1)
    probs_TE = gate_probs(z_TE, gate) * real_T1
    by_sequence = {
        "probs": (found.probs_BE, probs_TE),
        "score": (found.scalars_B2[:, :1], probs_TE.gather(1, ids_TK).sum(dim=1, keepdim=True)),
        "lse": (found.scalars_B2[:, 1:], z_TE.logsumexp(dim=1, keepdim=True).square() * real_T1),
    }
    for got, per_token in by_sequence.values():
        torch.testing.assert_close(got, per_token.view(sequences, -1, got.shape[1]).sum(dim=1), rtol=2e-6, atol=1e-6)


@given(cases(), st.booleans())
@EXAMPLES
def test_gradient_of_weights_and_logits_is_that_of_float64_autograd(case, with_logits):
    _, gate, normalize, scale = case["form"]
    ids_TK, z_TE = run(case).ids_TK, case["z"].double().requires_grad_()
    scores_TK = gate_scores(z_TE, gate).gather(1, ids_TK)
    if normalize:
        scores_TK = gate_log_scores(z_TE.gather(1, ids_TK), gate).softmax(dim=1)
    grad_TK = torch.randn(ids_TK.shape, generator=case["generator"]).to(DEVICE)
    grad_TE = torch.randn(z_TE.shape, generator=case["generator"]).to(DEVICE) if with_logits else None
    outputs = [(scale * scores_TK * grad_TK).sum()] + ([(z_TE * grad_TE).sum()] if grad_TE is not None else [])
    (expected,) = torch.autograd.grad(outputs, z_TE)
    got, squares = router_gradient(case["z"], ids_TK, case["form"], grad_TK, grad_TE, norms=True)
    size = float(scale * grad_TK.abs().max())
    close(got, expected, size)
    close(squares, torch.stack([expected.square().sum(), expected.new_zeros(())]), size)


@given(cases(), st.integers(0, 2), st.booleans())
@EXAMPLES
def test_pressure_of_every_term_is_the_gradient_of_its_loss(case, terms, z_loss):
    """q = row + factor f per term and sequence: the loss is sum over tokens of <q, p>, and factor (logsumexp)^2."""
    gate, sequences = case["form"].gate, case["sequences"]
    ids_TK, z_TE = run(case).ids_TK, case["z"].double().requires_grad_()
    tokens, num_experts = z_TE.shape
    fraction_NBE, grad_coefs = (
        torch.rand(size, generator=case["generator"], dtype=torch.float64).to(DEVICE)
        for size in ((terms, sequences, num_experts), (terms * (num_experts + 1) + 2,))
    )
    row_N1E = grad_coefs[: terms * num_experts].view(terms, 1, num_experts)
    q_NBE = row_N1E + grad_coefs[terms * num_experts : -2].view(terms, 1, 1) * fraction_NBE
    probs_BSE = gate_probs(z_TE, gate).view(sequences, -1, num_experts)
    real_T = torch.ones(tokens, device=DEVICE) if case["mask"] is None else case["mask"].double()
    losses = [(q_BE.unsqueeze(1) * probs_BSE).sum(dim=2).flatten() @ real_T.double() for q_BE in q_NBE]
    losses.append(float(z_loss) * grad_coefs[-2] * z_TE.logsumexp(dim=1).square() @ real_T.double())
    pushes = [torch.autograd.grad(loss, z_TE, retain_graph=True)[0] for loss in losses]
    options = {"grad_coefs": grad_coefs, "fraction_NBE": fraction_NBE, "token_mask_T": case["mask"], "z_loss": z_loss}
    got, squares = router_gradient(case["z"], ids_TK, case["form"], None, **options, norms=True)
    size = float(q_NBE.sum()) + float(2 * grad_coefs[-2] * case["z"].abs().max())
    close(got, torch.stack(pushes).sum(dim=0), size)
    close(squares, torch.stack([z_TE.new_zeros(()), *(push.square().sum() for push in pushes)]), size)
    without_norms, zeros = router_gradient(case["z"], ids_TK, case["form"], None, **options)
    close(without_norms, torch.stack(pushes).sum(dim=0), size)
    assert not zeros.any()


def close(got: Tensor, expected: Tensor, size: float) -> None:
    """To fp32's rounding of numbers of this size: q and <p, q> may cancel."""
    torch.testing.assert_close(got.double(), expected.detach(), rtol=1e-5, atol=1e-6 * size)


TERMS = [LossTerm("deferred"), LossTerm("sequences"), LossTerm("micro_batch"), LossTerm("sequences", 2, True)]


@given(cases(), st.lists(st.sampled_from(TERMS), max_size=3), st.sampled_from([None, 1, 2]))
@EXAMPLES
def test_statistics_are_those_that_a_meter_takes(case, terms, micro):
    top_k, gate, *_ = case["form"]
    spec = StatsSpec(case["z"].shape[1], top_k, gate, tuple(terms), z_loss=True, micro_sequences=micro)
    found = run(case, plain=spec.unbiased and case["bias"] is not None, lse=True)
    sequences, batch = case["sequences"], TokenLayout(case["sequences"], case["mask"])
    wide = measure(spec, case["z"].double(), found.ids_TK, found.counts_BE, batch)
    spans = [sequences if t.kind == "micro_batch" else 0 if t.kind == "deferred" else t.sequences for t in terms]
    offsets, unbiased_N = [spec.at(name) for name in STATISTICS], [t.unbiased for t in terms]
    got, fraction_NBE = summarize(found, spec.forward_size, offsets, spans, unbiased_N, micro or sequences)
    assert got.shape == wide.statistics.shape
    unbiased = slice(spec.at("tokens") - spec.num_experts, spec.at("tokens")) if spec.unbiased else slice(0)
    if case["z"].unique().numel() == case["z"].numel():  # else top-k of equal logits is any of them
        torch.testing.assert_close(fraction_NBE, wide.fraction_NBE.double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(got, wide.statistics, rtol=2e-6, atol=1e-6)
    else:
        same = [i for i in range(spec.values_at) if i not in range(len(got))[unbiased]]
        torch.testing.assert_close(got[same], wide.statistics[same], rtol=2e-6, atol=1e-6)


@given(cases())
@EXAMPLES
def test_a_repeat_gives_the_same_bits(case):
    grad_TK = torch.randn(len(case["z"]), case["form"].top_k, generator=case["generator"]).to(DEVICE)
    once, again = run(case, plain=True, lse=True), run(case, plain=True, lse=True)
    assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))
    gradients = [router_gradient(case["z"], once.ids_TK, case["form"], grad_TK, norms=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("normalize", [True, False])
def test_infinities_and_nan_go_where_they_go_in_plain_pytorch(gate, normalize):
    """NaN comes first, as `torch.topk` puts it, and spoils its token only; an expert at -inf comes last."""
    inf, nan = float("inf"), float("nan")
    z_TE = torch.tensor([[1.0, -inf, 0.5, 2.0], [nan, 1.0, 3.0, 2.0], [-200.0, -110.0, -300.0, -111.0]], device=DEVICE)
    form = RouterForm(2, gate, normalize, 1.0)
    found = choose_and_count(z_TE, form, num_sequences=3)
    assert found.ids_TK.tolist() == [[3, 0], [0, 2], [1, 3]]
    wide = z_TE.double()  # plain PyTorch refuses them on a CPU: take its parts
    scores_TK = gate_scores(wide, gate).gather(1, found.ids_TK)
    if normalize:
        scores_TK = gate_log_scores(wide.gather(1, found.ids_TK), gate).softmax(dim=1)
    torch.testing.assert_close(found.weights_TK.double(), scores_TK, rtol=1e-5, atol=1e-38, equal_nan=True)
    torch.testing.assert_close(found.probs_BE, gate_probs(wide, gate), rtol=1e-5, atol=1e-12, equal_nan=True)
    got, _ = router_gradient(z_TE, found.ids_TK, form, torch.tensor([[1.0, -2.0]] * 3, device=DEVICE))
    assert torch.isfinite(got[[0, 2]]).all()


def test_equal_scores_go_to_the_lower_ids_and_zeros_have_no_sign():
    z_TE = torch.tensor([[0.0, -0.0, 0.0, -0.0], [5.0] * 4], device=DEVICE)
    assert choose_and_count(z_TE, RouterForm(3, "softmax", True, 1.0)).ids_TK.tolist() == [[0, 1, 2]] * 2


def test_padding_adds_nothing_even_where_it_is_nan():
    z_TE = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    mask_T = torch.tensor([True, True, False, True, False, True], device=DEVICE)
    form = RouterForm(2, "softmax", True, 1.0)
    clean = choose_and_count(z_TE, form, token_mask_T=mask_T, lse=True)
    z_TE[~mask_T] = float("nan")
    dirty = choose_and_count(z_TE, form, token_mask_T=mask_T, lse=True)
    assert all(torch.equal(a, b) for a, b in zip(clean[2:], dirty[2:], strict=True))


def test_what_does_not_fit_is_left_to_plain_pytorch():
    z_TE = torch.zeros(4, 8, device=DEVICE)
    assert fits(z_TE, 2)
    assert not fits(z_TE, 2, num_groups=2)
    assert not fits(z_TE.double(), 2)
    assert not fits(z_TE[:0], 2)
    assert not fits(torch.zeros(1, 2000, device=DEVICE), 2)
    assert not fits(torch.zeros(1, 100, device=DEVICE), 17)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gate_in_bf16_parts_is_as_exact_as_in_fp32(dtype):
    generator = torch.Generator().manual_seed(1)
    x_TD = torch.randn(37, 64, generator=generator).bfloat16().to(DEVICE).requires_grad_()
    weight_ED = (torch.randn(11, 64, generator=generator) / 8).to(dtype).to(DEVICE).requires_grad_()
    grad_TE = torch.randn(37, 11, generator=generator).to(DEVICE)
    assert gate_fits(x_TD, weight_ED)
    z_TE = gate_logits(x_TD, weight_ED)
    assert z_TE.dtype == torch.float32
    z_TE.backward(grad_TE)
    x, weight = x_TD.detach().double(), weight_ED.detach().double()
    torch.testing.assert_close(z_TE.detach().double(), x @ weight.T, rtol=0, atol=1e-6)
    exact = {"x": (x_TD.grad, grad_TE.double() @ weight), "weight": (weight_ED.grad, grad_TE.double().T @ x)}
    for got, expected in exact.values():
        assert got is not None
        bits = 24 if got.dtype == torch.float32 else 8
        worst = float(((got.double() - expected).abs() / expected.abs().max()).max())
        assert worst <= 2.0 ** -(bits - 2)


def test_the_parts_of_plain_pytorch_agree():
    """`choose` is what the kernels replace: the same ids and weights where nothing ties."""
    generator = torch.Generator().manual_seed(3)
    z_TE, bias_E = (torch.randn(size, generator=generator).to(DEVICE) for size in ((50, 12), (12,)))
    for gate, place, biased in itertools.product(GATES, PLACES, (False, True)):
        bias = bias_E if biased else None
        options = {"num_groups": 1, "top_groups": 1, "selection_bias": bias, "bias_place": place}
        weights_TK, ids_TK, *_ = choose(z_TE, 4, gate=gate, normalize=True, scale=2.5, **options)
        found = choose_and_count(z_TE, RouterForm(4, gate, True, 2.5), selection_bias_E=bias, bias_place=place)
        assert torch.equal(found.ids_TK, ids_TK)
        torch.testing.assert_close(found.weights_TK, weights_TK)
