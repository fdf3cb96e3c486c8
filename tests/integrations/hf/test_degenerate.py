"""Routers of transformers that a load cannot show to be ill are told of as ours are."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from equipoise import AuxLoss, Balancer, ConfigError, ExpertBias, ZLoss
from integrations.hf._cases import inputs, loss_of
from integrations.hf.families import build

PUSH = [AuxLoss("global_batch", 0.1)]


def at_routers(model) -> float:
    """The norm of the language model's gradient at the routers."""
    loss_of(model, inputs()).backward()
    return float(sum(p.grad.norm() for name, p in model.named_parameters() if ".gate." in name))


def test_top_1_with_normalised_weights_is_told_of():
    model = build("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=True)
    assert at_routers(model) < 1e-6
    with pytest.warns(UserWarning, match=r"top-1 with normalised weights.*layers\.0.*norm_topk_prob=False"):
        Balancer(model, PUSH)


def test_its_remedy_teaches_the_router_and_is_taken():
    model = build("qwen3_moe", num_experts_per_tok=1, norm_topk_prob=False)
    assert at_routers(model) > 1e-4
    Balancer(model, PUSH)


def test_a_bias_of_ours_follows_a_k_that_is_set_anew():
    model = build("qwen3_moe", norm_topk_prob=True)
    balancer = Balancer(model, [ExpertBias("proportional", rate=1e-3)])
    for layer in model.model.layers:
        layer.mlp.gate.top_k = 1
    balancer.tap(loss_of(model, inputs())).backward()
    balancer.step()
    tokens = balancer.metrics()["balance/tokens"]
    assert [int(counts_E.sum()) for counts_E in balancer.load()] == [tokens] * len(model.model.layers)


def test_all_experts_for_every_token_are_refused_and_may_be_measured():
    model = build("qwen3_moe", num_experts_per_tok=8)
    with pytest.raises(ConfigError, match="top_k=8 of 8 experts"):
        Balancer(model, PUSH)
    Balancer(model, [ZLoss()])
