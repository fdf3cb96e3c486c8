"""Sensitivities against what dropping really costs: in nats of a model without a past, and as an order of layers."""

from __future__ import annotations

import math

import pytest
import torch

from equipoise import ConfigError, InputError
from equipoise.adaptive import evaluate, measure_sensitivity
from equipoise.adaptive.sweep import ALL
from unit.adaptive._models import adaptable, language_model, markov_text, trained


def divergence(lm, ids, threshold: float, layer: int) -> float:
    """Mean KL of the predictions from those with one expert a token in one layer: the loss on text of its own."""
    gate = lm.model.layers[layer].mlp.gate
    with torch.no_grad():
        before = lm(ids).double().log_softmax(-1)
        gate.drop_below(threshold)
        after = lm(ids).double().log_softmax(-1)
        gate.drop_below(None)
    return float((before.exp() * (before - after)).sum(-1).mean())


@pytest.mark.parametrize(
    ("top_k", "normalize", "gate"), [(2, True, "softmax"), (3, True, "sigmoid"), (2, False, "softmax")]
)
def test_what_is_predicted_in_nats_is_what_dropping_costs(top_k, normalize, gate):
    """Where attention adds nothing, a token depends on itself alone and small changes cost their quadratic form."""
    lm = language_model(layers=2, top_k=top_k, normalize_weights=normalize, gate=gate, init_std=0.1)
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.experts.down_proj.mul_(0.3)
    ids = torch.randint(300, (24, 101), generator=torch.Generator().manual_seed(0))
    batches = [ids] * 6  # each draws other targets
    profile = measure_sensitivity(adaptable(lm), batches, seed=3)
    assert profile.tokens == 6 * 2400
    for layer, name in enumerate(profile.alone):
        assert profile.alone[name] == pytest.approx(divergence(lm, ids[:, :-1], ALL, layer), rel=0.1)
        assert profile.lost[name].shape == (14400, top_k - 1)


@pytest.mark.parametrize("factors", [(8, 2, 0.5), (0.5, 8, 2)])
def test_predicted_and_measured_are_in_one_order(factors):
    """A trained model, other text: which layers' second experts matter most, whatever the place of the layer."""
    lm = trained(60, factors)
    model, text = adaptable(lm), markov_text(256, 25, seed=2)
    profile = measure_sensitivity(model, list(markov_text(128, 25, seed=3).split(32)))
    before = evaluate(model, [text]).loss
    assert before < 2, "it has learnt something: ln 150 is 5.0, what can be known 1.5"
    measured = {}
    for name in model.routers:
        with model.dropping({other: ALL if other == name else 0.0 for other in model.routers}):
            measured[name] = evaluate(model, [text]).loss - before
    assert sorted(measured, key=measured.__getitem__) == sorted(profile.alone, key=profile.alone.__getitem__)
    most = list(model.routers)[factors.index(8)]
    assert max(profile.sensitivity, key=profile.sensitivity.__getitem__) == most


def test_the_model_is_as_it_was():
    lm = language_model()
    lm.lm_head.weight.requires_grad_(False)
    learned = {name: p.requires_grad for name, p in lm.named_parameters()}
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
    before = lm(ids)
    first = measure_sensitivity(adaptable(lm), [ids], seed=1)
    assert torch.equal(lm(ids), before)
    assert learned == {name: p.requires_grad for name, p in lm.named_parameters()}
    assert all(p.grad is None for p in lm.parameters()) and all(not m._forward_hooks for m in lm.modules())
    again = measure_sensitivity(adaptable(lm), [ids], seed=1)
    assert first.sensitivity == again.sensitivity
    assert measure_sensitivity(adaptable(lm), [ids], seed=2).sensitivity != first.sensitivity
    assert measure_sensitivity(adaptable(lm), [ids], targets="text").sensitivity != first.sensitivity


def test_what_cannot_be_measured():
    lm = language_model()
    with pytest.raises(InputError, match="at least one batch"):
        measure_sensitivity(adaptable(lm), [])
    with pytest.raises(ConfigError, match="model or text"):
        measure_sensitivity(adaptable(lm), [torch.zeros(1, 4, dtype=torch.long)], targets="labels")
    with pytest.raises(ConfigError, match="one expert a token"):
        adaptable(language_model(top_k=1))
    sure = language_model(top_k=3, top_p=1e-6, normalize_weights=False)
    with pytest.raises(ConfigError, match="one expert for every token"):
        measure_sensitivity(adaptable(sure), [torch.zeros(1, 4, dtype=torch.long)])
    with torch.no_grad():
        lm.lm_head.weight[0] = math.inf
    with pytest.raises(InputError, match="finite"):
        measure_sensitivity(adaptable(lm), [torch.zeros(1, 4, dtype=torch.long)])
