"""Our routing and loss beside those of Hugging Face transformers: the same where they should be, and where not."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F

from equipoise.functional import balance_loss, gate_probs, route

pytest.importorskip("transformers")

DEEPSEEK = {
    "n_routed_experts": 32,
    "n_group": 8,
    "topk_group": 3,
    "num_experts_per_tok": 6,
    "routed_scaling_factor": 2.5,
}


def router(family: str, config_name: str, router_name: str, **settings):
    folder = f"transformers.models.{family}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{family}"), config_name)(
        hidden_size=24, **settings
    )
    module = getattr(importlib.import_module(f"{folder}.modeling_{family}"), router_name)(config)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(module.weight, generator=generator)
    if hasattr(module, "e_score_correction_bias"):
        torch.nn.init.normal_(module.e_score_correction_bias, std=0.3, generator=generator)
    return module


def same(theirs, ours):
    """Equal choices with equal weights; the order among the chosen is nobody's promise."""
    _, weights, ids = theirs
    order, ours_order = ids.argsort(dim=1), ours.expert_ids_TK.argsort(dim=1)
    assert torch.equal(ids.gather(1, order), ours.expert_ids_TK.gather(1, ours_order))
    torch.testing.assert_close(weights.gather(1, order), ours.weights_TK.gather(1, ours_order), rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("normalize", [True, False])
def test_softmax_like_qwen3(normalize):
    theirs = router(
        "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeTopKRouter",
        num_experts=16, num_experts_per_tok=4, norm_topk_prob=normalize,
    )  # fmt: skip
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1))
    same(theirs(x), route(F.linear(x, theirs.weight), 4, normalize=normalize))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("family", "config", "name"),
    [
        ("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter"),
        ("glm4_moe", "Glm4MoeConfig", "Glm4MoeTopkRouter"),
    ],
)
def test_sigmoid_with_bias_and_groups_like_deepseek_v3_and_glm4(family, config, name, normalize):
    theirs = router(family, config, name, norm_topk_prob=normalize, **DEEPSEEK)
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(2))
    ours = route(
        F.linear(x, theirs.weight), 6, gate="sigmoid", selection_bias_E=theirs.e_score_correction_bias,
        num_groups=8, top_groups=3, normalize=normalize, scale=2.5,
    )  # fmt: skip
    same(theirs(x), ours)


def test_sqrt_softplus_like_deepseek_v4():
    theirs = router(
        "deepseek_v4", "DeepseekV4Config", "DeepseekV4TopKRouter",
        n_routed_experts=16, num_experts_per_tok=4, routed_scaling_factor=1.5, scoring_func="sqrtsoftplus",
    )  # fmt: skip
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(3))
    bias = theirs.e_score_correction_bias
    same(theirs(x), route(F.linear(x, theirs.weight), 4, gate="sqrt_softplus", selection_bias_E=bias, scale=1.5))


def test_where_scores_underflow_ours_still_divide():
    """Their sum of sigmoids is 0 at z = -110 and the token loses its experts; ours shares it out."""
    theirs = router("deepseek_v3", "DeepseekV3Config", "DeepseekV3TopkRouter", norm_topk_prob=True, **DEEPSEEK)
    with torch.no_grad():
        theirs.weight.fill_(-110 / 24)
    x = torch.ones(1, 24)
    assert theirs(x)[1].sum() == 0
    ours = route(F.linear(x, theirs.weight), 6, gate="sigmoid", scale=2.5)
    torch.testing.assert_close(ours.weights_TK.sum(), torch.tensor(2.5))


def theirs_and_ours(layers, top_k, mask=None):
    loss_of = importlib.import_module("transformers.models.mixtral.modeling_mixtral").load_balancing_loss_func
    theirs = loss_of(tuple(layers), num_experts=layers[0].shape[1], top_k=top_k, attention_mask=mask)
    mask_T = None if mask is None else mask.reshape(-1).bool()
    ours = [balance_loss(gate_probs(z), z.topk(top_k).indices, token_mask_T=mask_T) for z in layers]
    return theirs, ours


@pytest.mark.parametrize("top_k", [1, 2, 8])
@pytest.mark.parametrize("masked", [False, True])
def test_their_loss_of_one_layer_is_ours_times_k(top_k, masked):
    generator = torch.Generator().manual_seed(4)
    logits = 2 * torch.randn(64, 16, generator=generator)
    mask = (torch.rand(4, 16, generator=generator) > 0.4).long() if masked else None
    theirs, ours = theirs_and_ours([logits], top_k, mask)
    torch.testing.assert_close(theirs, top_k * ours[0])


def test_their_pooling_over_layers_hides_what_ours_sees():
    """Each layer sends every token to one expert, each layer to another: pooled counts look balanced."""
    layers = [torch.full((32, 4), -20.0).index_fill_(1, torch.tensor([expert]), 20.0) for expert in range(4)]
    theirs, ours = theirs_and_ours(layers, 1)
    torch.testing.assert_close(theirs, torch.tensor(1.0))  # the value of perfect balance
    torch.testing.assert_close(torch.stack(ours), torch.full((4,), 4.0))  # E: the value of collapse, in every layer
