"""Budgets against counts, the curve against a model that is run by hand, knees of curves that have one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from equipoise import ConfigError, InputError, StateError
from equipoise.adaptive import (
    Profile,
    budget_for,
    evaluate,
    knee,
    measure_sensitivity,
    sensitivity,
    sweep,
    thresholds_of,
)
from equipoise.adaptive.sweep import ALL, random_layers
from equipoise.functional import loss_per_squared_weight
from unit.adaptive._models import adaptable, language_model, markov_text


def profile_of(seed: int = 0, top_k: int = 3, layers: int = 3) -> Profile:
    draw = torch.Generator().manual_seed(seed)
    names = [f"layer {i}" for i in range(layers)]
    lost = {name: torch.rand(50, top_k - 1, generator=draw).cumsum(-1) / top_k for name in names}
    return Profile({name: 10.0**-i for i, name in enumerate(names)}, lost, {}, 50)


@pytest.mark.parametrize("sensitive", [True, False])
@pytest.mark.parametrize("fewer", [0.0, 0.1, 0.25, 0.5, 2 / 3])
def test_a_budget_drops_the_share_that_was_asked_for(fewer, sensitive):
    profile = profile_of()
    budget = budget_for(profile, fewer, sensitive=sensitive)
    limits = thresholds_of(profile, budget) if sensitive else dict.fromkeys(profile.lost, math.sqrt(budget))
    dropped = sum(int((lost < limits[name]).sum()) for name, lost in profile.lost.items())
    assert dropped == round(fewer * 3 * 3 * 50)


def test_thresholds_are_where_the_cost_is_the_budget():
    profile = profile_of()
    for name, limit in thresholds_of(profile, 0.003).items():
        assert profile.sensitivity[name] * limit**2 == pytest.approx(0.003)
    assert thresholds_of(Profile({"a": 0.0}, {}, {}, 1), 0.1) == {"a": ALL}
    assert thresholds_of(Profile({"a": 0.0}, {}, {}, 1), 0.0) == {"a": 0.0}


def test_the_curve_is_what_the_model_does_with_these_thresholds():
    lm = language_model(layers=2, top_k=3)
    model, text = adaptable(lm), markov_text(8, 17, seed=4)
    profile = measure_sensitivity(model, [text])
    points = sweep(model, profile, [text[:3], text[3:]], shares=[0.0, 0.2, 2 / 3])
    assert [point.fewer for point in points] == [0.0, 0.2, 2 / 3]
    with torch.no_grad():
        plain = F.cross_entropy(lm(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
    assert points[0].held.loss == pytest.approx(float(plain), rel=1e-6) == points[0].control.loss
    assert points[0].held.experts == dict.fromkeys(model.routers, 3.0)
    assert points[-1].held.experts == dict.fromkeys(model.routers, 1.0) == points[-1].control.experts
    assert points[-1].held.loss == points[-1].control.loss
    middle = points[1]
    for limits, found in (
        (thresholds_of(profile, middle.budget), middle.held),
        (dict.fromkeys(model.routers, middle.weight), middle.control),
    ):
        for layer, limit in zip(lm.model.layers, limits.values(), strict=True):
            layer.mlp.gate.drop_below(limit)
        with torch.no_grad():
            loss = F.cross_entropy(lm(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())
        for layer in lm.model.layers:
            layer.mlp.gate.drop_below(None)
        assert found.loss == pytest.approx(float(loss), rel=1e-6)
        assert found.fewer(model) == pytest.approx(0.2, abs=0.03), "of the text it was chosen on, but for later layers"
    same = sweep(model, profile, [text], budgets=[0.0, middle.budget])
    assert same[1].fewer == pytest.approx(0.2, abs=0.01) and same[1].held == middle.held == evaluate_at(
        model, profile, middle, text
    )


def evaluate_at(model, profile, point, text):
    with model.dropping(thresholds_of(profile, point.budget)):
        return evaluate(model, [text])


def test_budgets_out_of_order_and_no_text():
    model = adaptable(language_model())
    for wrong in ([0.1, 0.01], [0.1, 0.1], [-1.0, 0.0]):
        with pytest.raises(ConfigError, match="each above the one before"):
            sweep(model, profile_of(), [torch.zeros(1, 4, dtype=torch.long)], budgets=wrong)
    with pytest.raises(InputError, match="held-out text"):
        sweep(model, profile_of(), [])


@pytest.mark.parametrize(
    ("x", "y", "at"),
    [
        ([0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 1, 2], 3),  # two straight lines
        ([0, 1, 2], [0, 1, 2], 0),  # a straight line has none: nothing is dropped
        ([0, 1, 2], [0, -1, -2], 2),  # dropping helps
        ([0.0], [1.0], 0),
    ],
)
def test_knees(x, y, at):
    assert knee(x, y) == at


def test_the_knee_of_a_hyperbola_is_where_it_is_parallel_to_its_chord():
    x = [i / 1000 for i in range(1001)]
    y = [1 / (1.1 - value) for value in x]
    assert x[knee(x, y)] == pytest.approx(1.1 - math.sqrt(0.1 * 1.1), abs=2e-3)


def test_layers_at_random():
    names = [f"{i}" for i in range(6)]
    drawn = [random_layers(names, 0.5, seed) for seed in range(20)]
    assert all(sorted(one.values()) == [0.0] * 3 + [ALL] * 3 for one in drawn)
    assert len({tuple(one.values()) for one in drawn}) > 5 and drawn[3] == random_layers(names, 0.5, 3)


def test_choices_that_tokens_never_made_are_not_dropped(monkeypatch):
    """With top-p a token uses fewer than K experts already: the curve begins at 0, and S is of what can be dropped."""
    lm = language_model(layers=2, top_k=4, top_p=0.5, normalize_weights=False)
    model, text = adaptable(lm), markov_text(8, 17, seed=4)
    costs: list[torch.Tensor] = []

    def kept(*arguments, **keywords):
        costs.append(loss_per_squared_weight(*arguments, **keywords))
        return costs[-1]

    monkeypatch.setattr(sensitivity, "loss_per_squared_weight", kept)
    profile = measure_sensitivity(model, [text])
    assert len(costs) == len(profile.lost) == 2
    for (name, lost_TJ), cost_TJ in zip(profile.lost.items(), costs, strict=True):
        pairs = zip(cost_TJ.flatten().tolist(), lost_TJ.flatten().tolist(), strict=True)
        able = [cost for cost, lost in pairs if lost > 0]
        assert len(able) < cost_TJ.numel() and profile.sensitivity[name] == pytest.approx(sum(able) / len(able))
    routings: list = []
    handles = [one.module.register_forward_hook(lambda *a: routings.append(a[-1])) for one in model.routers.values()]
    lm(text[:, :-1])
    for handle in handles:
        handle.remove()
    made = [int((one.expert_ids_TK < 6).sum()) for one in routings]
    assert profile.choices == sum(made) < 0.9 * 4 * 2 * 128
    points = sweep(model, profile, [text])
    before, fewest = points[0].held, points[-1].held
    assert [before.experts[name] for name in model.routers] == [one / 128 for one in made]
    assert before.fewer(model, before) == 0.0 < before.fewer(model)
    assert points[1].budget > 0
    assert points[-1].fewer == pytest.approx(fewest.fewer(model, before)) == 1 - 2 * 128 / sum(made)
    for point in points[1:-1]:
        assert point.held.fewer(model, before) == pytest.approx(point.fewer, abs=0.03)


def test_a_model_that_drops_already_is_not_measured():
    lm = language_model()
    lm.model.layers[1].mlp.gate.drop_below(0.3)
    with pytest.raises(StateError, match=r"a model without thresholds(.|\n)*layers\.1"):
        adaptable(lm)
