"""The balance loss of released `transformers` (5.23 is what these numbers are of) on the same tokens as the law."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from contracts.peers._law import factor, law
from contracts.peers._ours import our_gradients

modeling = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe", reason="transformers is optional")


def theirs(layers: list[Tensor], top_k: int, mask: Tensor | None = None) -> tuple[float, list[Tensor]]:
    given = tuple(z.detach().clone().requires_grad_() for z in layers)
    loss = modeling.load_balancing_loss_func(given, layers[0].shape[-1], top_k, mask)
    loss.backward()
    return float(loss.detach()), [z.grad for z in given]  # type: ignore[misc]


def skewed(seed: int, tokens: int = 24, experts: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator) + torch.randn(experts, generator=generator)


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_B11_the_loss_is_k_times_the_law(top_k):
    """One layer, so that nothing is pooled: value and gradient are those of the law times K; ours are the law."""
    z_TE = skewed(1)
    value, gradient_TE = law(z_TE, top_k)
    their_value, (their_gradient_TE,) = theirs([z_TE], top_k)
    assert their_value == pytest.approx(top_k * value, rel=1e-5)
    assert factor(their_gradient_TE, gradient_TE) == pytest.approx(top_k, rel=1e-4)
    (ours_TE,), _ = our_gradients([z_TE], top_k, "micro_batch")
    assert factor(ours_TE, gradient_TE) == pytest.approx(1, rel=1e-4)


def test_B12_layers_that_lean_opposite_ways_cancel():
    """Each layer sends everything to its own half of the experts: the pooled loss calls that perfect, and pushes not.

    The law, summed over layers, is 2 a layer; a mean over layers of one loss a layer would be 2 as well.
    """
    left_TE = torch.zeros(32, 8)
    left_TE[torch.arange(32), torch.arange(32) % 4] = 6.0  # K = 1: experts 0..3 in turn
    layers = [left_TE, left_TE.flip(-1)]
    apart = [law(z_TE, 1) for z_TE in layers]
    assert [round(value, 1) for value, _ in apart] == [2.0, 2.0]
    their_value, their_gradients = theirs(layers, 1)
    assert their_value == pytest.approx(1.0, rel=1e-6)  # perfect balance, to the last digit
    for z_TE, (_, gradient_TE), their_gradient_TE in zip(layers, apart, their_gradients, strict=True):
        assert their_gradient_TE.norm() < 1e-3 * gradient_TE.norm()
        (ours_TE,), balancer = our_gradients([z_TE], 1, "micro_batch")
        assert factor(ours_TE, gradient_TE) == pytest.approx(1, rel=1e-4)
        assert balancer.metrics()[f"balance/{balancer.schedule.names[0]}/loss"] == pytest.approx(apart[0][0], rel=1e-4)


def test_B12_equal_layers_are_a_mean_and_not_a_sum():
    """Without anything to cancel, pooling L layers pushes each by 1 / L of what the papers' sum over layers does."""
    z_TE = skewed(2)
    _, gradient_TE = law(z_TE, 2)
    _, gradients = theirs([z_TE, z_TE, z_TE], 2)
    assert factor(gradients[0], gradient_TE) == pytest.approx(2 / 3, rel=1e-4)  # K / L


def test_B62_padding_is_left_out_where_the_mask_is_passed():
    """Does not reproduce on 5.23: with the mask it is the law (times K); without, padding counts."""
    z_TE = skewed(3)
    mask_T = torch.arange(24) < 15
    value, gradient_TE = law(z_TE, 2, valid_T=mask_T.tolist())
    masked, (gradient,) = theirs([z_TE], 2, mask_T.view(2, 12).long())
    assert masked == pytest.approx(2 * value, rel=1e-5)
    assert factor(gradient, gradient_TE) == pytest.approx(2, rel=1e-4)
    assert theirs([z_TE], 2)[0] != pytest.approx(2 * value, rel=1e-2)


def test_B63_a_mask_of_four_dimensions_stops_the_loss():
    with pytest.raises(RuntimeError):
        theirs([skewed(4)], 2, torch.ones(2, 1, 12, 12))


def tiny(**config) -> torch.nn.Module:
    from transformers import Qwen3MoeConfig

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "moe_intermediate_size": 8, "head_dim": 8}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 8}
    return modeling.Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **heads, num_experts_per_tok=2, **config))


@pytest.mark.filterwarnings("ignore")
def test_B75_a_coefficient_alone_does_nothing():
    """The loss with coefficient 1 is the loss with 0 until output_router_logits is set as well; nothing is said."""
    ids = torch.arange(32).view(2, 16) % 31
    silent, off = (tiny(router_aux_loss_coef=c)(ids, labels=ids).loss for c in (1.0, 0.0))
    assert torch.equal(silent, off)
    said = tiny(router_aux_loss_coef=1.0, output_router_logits=True)(ids, labels=ids).loss
    assert float((said - off).detach()) == pytest.approx(2.0, rel=0.2)  # K times the law, near balance
