"""Dropping experts, and what that costs, against loops over tokens and against the layer's own output."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.functional import drop_experts, dropped_weight, loss_per_squared_weight

quick = settings(max_examples=60, deadline=None)
forms = pytest.mark.parametrize("normalize", [True, False])


def weights_of(seed: int, top_k: int, *, normalize: bool, tokens: int = 5) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    weights_TK = torch.rand(tokens, top_k, generator=draw, dtype=torch.float64) ** 3 + 1e-4
    return 2.5 * weights_TK / weights_TK.sum(-1, keepdim=True) if normalize else weights_TK


def naive_drop(weights: list[float], ids: list[int], threshold: float, *, normalize: bool, none: int):
    """One token: takes the smallest away as long as what is gone stays below the threshold."""
    total = math.fsum(weights)
    share = [w / total if normalize else w for w in weights]
    gone: list[int] = []
    for place in sorted(range(len(weights)), key=lambda i: (share[i], -i))[:-1]:
        if math.fsum(share[i] for i in [*gone, place]) >= threshold:
            break
        gone.append(place)
    left = math.fsum(w for i, w in enumerate(weights) if i not in gone)
    factor = total / left if normalize and gone else 1.0
    return (
        [0.0 if i in gone else w * factor for i, w in enumerate(weights)],
        [none if i in gone else one for i, one in enumerate(ids)],
    )


@forms
@quick
@given(st.integers(0, 2**20), st.integers(2, 6), st.floats(0, 1.2))
def test_as_a_loop_over_tokens(normalize, seed, top_k, threshold):
    weights_TK = weights_of(seed, top_k, normalize=normalize)
    near = (dropped_weight(weights_TK, normalize=normalize) - threshold).abs().min()
    if near < 1e-9:  # a sum in another order may round to the other side
        return
    ids_TK = torch.stack([torch.randperm(8)[:top_k] for _ in weights_TK])
    kept_TK, kept_ids_TK = drop_experts(weights_TK, ids_TK, threshold, normalize=normalize, none=8)
    for t, row in enumerate(weights_TK.tolist()):
        want, want_ids = naive_drop(row, ids_TK[t].tolist(), threshold, normalize=normalize, none=8)
        assert kept_TK[t].tolist() == pytest.approx(want, rel=1e-6)
        assert kept_ids_TK[t].tolist() == want_ids


@quick
@given(st.integers(0, 2**20), st.floats(1e-4, 1), st.floats(1e-3, 50))
def test_two_experts_are_the_rule_of_the_paper(seed, budget, sensitivity):
    """S w_2² < T, with w_2 normalised as Mixtral's are; the one that stays has all the weight."""
    weights_TK = weights_of(seed, 2, normalize=True) / 2.5
    threshold = math.sqrt(budget / sensitivity)
    kept_TK, _ = drop_experts(weights_TK, torch.tensor([[0, 1]] * 5), threshold, normalize=True, none=None)
    second_T = weights_TK.min(-1).values
    assert ((kept_TK == 0).any(-1) == (sensitivity * second_T**2 < budget)).all()
    assert torch.allclose(kept_TK.sum(-1), weights_TK.sum(-1), rtol=1e-6)


@forms
def test_what_it_leaves(normalize):
    weights_TK = weights_of(0, 4, normalize=normalize, tokens=200).float()
    ids_TK = torch.arange(4).expand(200, 4)
    same_TK, same_ids_TK = drop_experts(weights_TK, ids_TK, 0.0, normalize=normalize, none=9)
    assert torch.equal(same_TK, weights_TK) and torch.equal(same_ids_TK, ids_TK)
    before = torch.zeros(200, dtype=torch.bool).unsqueeze(1).expand(-1, 4)
    for threshold in (0.05, 0.2, 0.5, math.inf):
        kept_TK, kept_ids_TK = drop_experts(weights_TK, ids_TK, threshold, normalize=normalize, none=9)
        gone_TK = kept_ids_TK == 9
        assert torch.equal(gone_TK, kept_TK == 0)
        assert (before <= gone_TK).all(), "a larger threshold drops what a smaller one does"
        untouched_T = ~gone_TK.any(-1)
        assert torch.equal(kept_TK[untouched_T], weights_TK[untouched_T]), "to the bit"
        if not normalize:
            assert torch.equal(kept_TK[~gone_TK], weights_TK[~gone_TK])
        before = gone_TK
    assert (gone_TK.sum(-1) == 3).all() and (kept_TK.argmax(-1) == weights_TK.argmax(-1)).all()


def test_equal_weights_go_from_the_last():
    weights_TK, ids_TK = torch.full((1, 4), 0.25), torch.tensor([[5, 6, 7, 8]])
    _, kept_TK = drop_experts(weights_TK, ids_TK, 0.6, normalize=True, none=-1)
    assert kept_TK.tolist() == [[5, 6, -1, -1]]


def test_half_precision_is_kept():
    weights_TK = weights_of(1, 2, normalize=True).bfloat16()
    kept_TK, _ = drop_experts(weights_TK, torch.tensor([[0, 1]] * 5), torch.tensor(9.0), normalize=True, none=None)
    assert kept_TK.dtype == torch.bfloat16
    assert torch.allclose(kept_TK.sum(-1).float(), weights_TK.float().sum(-1), rtol=1e-2)


@forms
@pytest.mark.parametrize("top_k", [2, 3, 5])
def test_the_cost_is_that_of_the_output_that_moves(normalize, top_k):
    """Half the squared change of a linear loss, when the layer really drops, over the squared weight that is lost."""
    draw = torch.Generator().manual_seed(top_k)
    weights_TK = weights_of(top_k, top_k, normalize=normalize).requires_grad_()
    experts_TKD = torch.randn(5, top_k, 7, dtype=torch.float64, generator=draw)
    gradient_TD = torch.randn(5, 7, dtype=torch.float64, generator=draw)

    def output(weights_TK: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tk,tkd->td", weights_TK, experts_TKD)

    (gradients_TK,) = torch.autograd.grad((output(weights_TK) * gradient_TD).sum(), weights_TK)
    found_TJ = loss_per_squared_weight(weights_TK.detach(), gradients_TK, normalize=normalize)
    lost_TJ = dropped_weight(weights_TK.detach(), normalize=normalize)
    assert found_TJ.shape == lost_TJ.shape == (5, top_k - 1)
    for t in range(5):
        for j in range(top_k - 1):
            row = weights_TK.detach()[t : t + 1]
            threshold = float(lost_TJ[t, j]) * (1 + 1e-9)
            kept, _ = drop_experts(row, torch.arange(top_k)[None], threshold, normalize=normalize, none=None)
            assert int((kept == 0).sum()) == j + 1
            change = (output(torch.cat([kept] * 5))[t] - output(weights_TK.detach())[t]) @ gradient_TD[t]
            assert float(found_TJ[t, j]) == pytest.approx(float(change**2 / (2 * lost_TJ[t, j] ** 2)), rel=1e-6)


def test_weights_that_underflowed_cost_what_their_direction_says():
    weights_TK, gradients_TK = torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    found_TJ = loss_per_squared_weight(weights_TK, gradients_TK, normalize=True)
    assert found_TJ[0].tolist() == pytest.approx([(4 - 1) ** 2 / 2, (3 - 1) ** 2 / 2], rel=1e-6)
