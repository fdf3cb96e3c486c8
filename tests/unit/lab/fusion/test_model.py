"""Equal active width, causal in evaluation, and the same weights wherever strategies have the same layers."""

from __future__ import annotations

import pytest
import torch

from equipoise import ConfigError
from equipoise.lab.fusion.config import ModelConfig, read_config
from equipoise.lab.fusion.model import FusionModel, active_parameters
from equipoise.lab.fusion.strategies import DEFAULT, MODALITIES, read_strategy

CONFIG = ModelConfig(layers=2, width=16, heads=2, experts=6, image_experts=2, hidden=24)


def model_of(name: str, seed: int = 0) -> FusionModel:
    return FusionModel(CONFIG, read_strategy(name), vocabulary=30, seed=seed)


def test_each_strategy_computes_a_token_with_the_width_of_one_expert():
    """Of experts exactly alike; routers are what is left."""
    dense = 2 * 3 * 16 * 24
    bare, computed = active_parameters(model_of("dense"), 1.0, "text")
    assert computed == dense
    gate, auxiliary = 2 * 16, 2 * (16 * 16 + 16)
    for name in DEFAULT:
        for modality, experts in zip(MODALITIES, (4, 2), strict=True):
            experts = experts if name.startswith("groups") else 6
            total, computed = active_parameters(model_of(name), 1.0, modality)
            assert computed == dense, name
            routers = 0 if name == "dense" else gate * experts
            if name.endswith("choice"):
                routers += auxiliary + 2 * experts * (16 + 1)
            assert total - bare == routers, name


def test_strategies_of_a_seed_share_all_other_weights():
    dense, groups = model_of("dense").state_dict(), model_of("groups").state_dict()
    shared = [name for name in dense if "feed_forward." not in name]
    assert len(shared) > 10 and all(torch.equal(dense[name], groups[name]) for name in shared)
    assert not torch.equal(model_of("dense", seed=1).embed.weight, dense["embed.weight"])


@pytest.mark.parametrize("name", ["mixed", "mixed-classes", "groups", "dense", "mixed-choice", "groups-choice"])
def test_in_evaluation_no_token_sees_those_to_come(name):
    model = model_of(name).eval()
    for module in model.modules():
        if getattr(module, "thresholds", None) is not None:
            module.thresholds.fill_(0.5)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (3, 13), generator=generator)
    later = tokens.clone()
    later[:, 8:] = torch.randint(0, 30, (3, 5), generator=generator)
    with torch.no_grad():
        one, other = (model(t[:, :-1], t[:, 1:], (t[:, :-1] >= 20).long()) for t in (tokens, later))
    torch.testing.assert_close(one[:, :7], other[:, :7], rtol=1e-5, atol=1e-5)
    assert (one - other)[:, 8:].abs().max() > 1e-2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mixd", "did you mean 'mixed'"),
        ("groups:globl", "did you mean 'global'"),
        ("groups:sequence", "a scope of a group's tokens(.|\n)*'sequence' in 'groups:sequence'"),
        ("groups:micro->sequence:1", "a scope of a group's tokens(.|\n)*'sequence' in"),  # behind the switch
        ("mixed:document", "by documents"),
        (
            "mixed:micro:softmax",
            "the gate that all strategies have here, sigmoid(.|\n)*softmax in 'mixed:micro:softmax'",
        ),
    ],
)
def test_strategies_that_cannot_be_are_refused(name, said):
    with pytest.raises(ConfigError, match=said):
        read_strategy(name)


def test_losses_of_classes_push_together_as_one_of_all_tokens_does():
    both = read_strategy("mixed-classes").build(10)
    (one,) = read_strategy("mixed").build(10)
    assert [policy.tokens for policy in both] == list(MODALITIES)
    assert sum(policy.coef for policy in both) == one.coef


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model.image_experts": 8}, "both groups have experts"),
        ({"model.capacity": 5.0}, "0 < capacity <= num_experts"),
        ({"model.heads": 5}, "an even model.width"),
        ({"data.levels": 1}, "data.levels of 2 to 256"),
        ({"data.levels": 257}, "data.levels of 2 to 256"),
        ({"train.steps": 0}, "train.steps above 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        read_config(values=settings)
    with pytest.raises(ConfigError, match=r"a whole model\.capacity"):
        read_strategy("groups").layer(ModelConfig(capacity=1.5))
