"""Adaptive top-k in layers of ours: what is dropped is neither computed nor counted, and the threshold is saved."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from equipoise import AuxLoss, Balancer, ConfigError, MoE, Router, apply_adaptive_top_k, record_routing
from equipoise.functional import drop_experts
from equipoise.storage.adaptive_top_k_file import SavedThreshold, SavedTopK, write_top_k


def layer_of(**more) -> MoE:
    torch.manual_seed(0)
    return MoE(dim=8, hidden=16, num_experts=6, top_k=3, **more).eval()


@pytest.mark.parametrize("more", [{}, {"gate": "sigmoid", "scale": 2.5}, {"normalize": False}, {"num_shared": 1}])
def test_a_layer_is_its_kept_experts(more):
    layer, x = layer_of(**more), torch.randn(40, 8)
    whole = layer.gate(x)
    layer.gate.drop_below(0.3)
    weights, ids = drop_experts(
        whole.weights_TK, whole.expert_ids_TK, 0.3, normalize=layer.gate.normalize, none=layer.gate.num_experts
    )
    routing = layer.gate(x)
    assert torch.equal(routing.weights_TK, weights) and torch.equal(routing.expert_ids_TK, ids)
    assert int(routing.counts_E.sum()) == int((ids < 6).sum()) < 120
    wanted = torch.zeros(40, 8) if layer.shared_experts is None else layer.shared_experts(x).detach()
    for t in range(40):
        for k in range(3):
            if weights[t, k]:
                gate, up = (layer.experts.gate_up_proj[ids[t, k]] @ x[t]).chunk(2)
                y = layer.experts.down_proj[ids[t, k]] @ (torch.nn.functional.silu(gate) * up)
                wanted[t] += (weights[t, k] * y).detach()
    assert torch.allclose(layer(x), wanted, atol=1e-5)


def test_dropped_experts_are_not_computed():
    """Experts that no token keeps hold NaN."""
    layer, x = layer_of(), torch.randn(5, 8)
    layer.gate.drop_below(1e9)
    wanted = layer(x)
    routing = layer.gate(x)
    assert (routing.counts_E.sum() == 5) and (routing.expert_ids_TK == 6).sum() == 10
    others = (routing.counts_E == 0).nonzero().flatten()
    assert len(others)
    with torch.no_grad():
        layer.experts.down_proj[others] = math.nan
    assert torch.equal(layer(x), wanted)


def test_training_is_as_it_was():
    layer, x = layer_of(), torch.randn(2, 7, 8)
    plain = copy.deepcopy(layer).train()
    layer.gate.drop_below(0.5)
    layer.train()
    for one in (plain, layer):
        Balancer(one, [AuxLoss("micro_batch", coef=0.1)]).tap(one(x).square().mean()).backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), layer.parameters(), strict=True))


def test_a_checkpoint_has_the_threshold_and_one_without_is_as_before():
    layer, x = layer_of(), torch.randn(20, 8)
    whole, before = layer(x), layer.state_dict()
    assert not [name for name in before if "threshold" in name]
    layer.gate.drop_below(0.2)
    state = layer.state_dict()
    assert state["gate.drop_threshold"] == torch.tensor(0.2)
    fresh = layer_of()
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), layer(x)) and not torch.equal(layer(x), whole)
    layer.gate.drop_below(None)
    assert torch.equal(layer(x), whole) and layer.state_dict().keys() == before.keys()


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half().float(), lambda m: copy.deepcopy(m)])
def test_the_threshold_keeps_every_bit_through_casts(cast):
    router = Router(dim=8, num_experts=4, top_k=2)
    router.drop_below(0.1234567)
    kept = router.drop_threshold
    assert torch.equal(cast(router).drop_threshold, kept) and cast(router).drop_threshold.dtype == torch.float32


def test_a_file_is_applied_by_name(tmp_path):
    model, x = torch.nn.Sequential(layer_of(), layer_of()), torch.randn(20, 8)
    limits = {"0.gate": 0.1, "1.gate": 0.4}
    routers = {name: SavedThreshold(experts=6, top_k=3, threshold=limit) for name, limit in limits.items()}
    write_top_k(tmp_path, SavedTopK(routers=routers))
    assert apply_adaptive_top_k(model, tmp_path) == {"0.gate": True, "1.gate": True}
    assert [float(layer.gate.drop_threshold) for layer in model] == pytest.approx([0.1, 0.4])
    by_hand = torch.nn.Sequential(layer_of(), layer_of())
    for layer, limit in zip(by_hand, limits.values(), strict=True):
        layer.gate.drop_below(limit)
    assert torch.equal(model(x), by_hand(x))


def test_records_and_evaluations_keep_what_the_router_chose():
    """A record can be replayed by a model without thresholds; a balancer's evaluation counts K choices a token."""
    layer, x = layer_of(), torch.randn(1, 20, 8)
    with record_routing(layer) as plain:
        layer(x)
    balancer = Balancer(layer, [AuxLoss("global_batch", coef=0.1)])
    found = []
    for limit in (None, 0.3):
        layer.gate.drop_below(limit)
        with balancer.evaluation() as numbers, torch.no_grad():
            layer(x)
        found.append(dict(numbers))
    assert int(layer.gate(x[0]).counts_E.sum()) < 60 and found[0] and found[0] == found[1]
    with record_routing(layer) as record:
        layer(x)
    assert torch.equal(record.ids["gate"][0], plain.ids["gate"][0])
    balancer.remove()


@pytest.mark.parametrize(
    ("top_k", "threshold", "words"),
    [(2, -0.1, "0 or more"), (2, math.nan, "0 or more"), (1, 0.3, "two experts a token")],
)
def test_a_threshold_that_would_drop_nothing_is_refused(top_k, threshold, words):
    router = Router(dim=8, num_experts=4, top_k=top_k)
    with pytest.raises(ConfigError, match=words):
        router.drop_below(threshold)
    assert router.drop_threshold is None
