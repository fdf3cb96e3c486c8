"""Inspections side by side: unique names, means over layers, and a headline that claims no more than they show."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from equipoise.report.data.inspections import (
    LAYER_COLUMNS,
    headline_of,
    inspections_json,
    mean_of,
    name_inspections,
    straggler,
)
from unit.report.synthetic_inspection import synthetic_inspection


def called(model):
    one = synthetic_inspection(domains=2, layers=1, experts=4)
    return replace(one, facts=replace(one.facts, model=model))


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/olmoe", "b/qwen/"], ["olmoe", "qwen"]),
        (["a/olmoe", "b/olmoe"], ["a/olmoe", "b/olmoe"]),
        (["x/a/m", "y/a/m"], ["x/a/m", "y/a/m"]),
        (["a/m", "a/m"], ["m #1", "m #2"]),
        (["/"], ["model"]),
    ],
)
def test_names_are_as_short_as_they_can_be_and_unique(models, names):
    found = name_inspections([called(model) for model in models], first_colour=3)
    assert [one.name for one in found] == names
    assert [one.colour for one in found] == list(range(3, 3 + len(models)))


def test_means_are_over_the_layers_that_have_the_column(inspections):
    one, about = inspections[0], LAYER_COLUMNS[3]
    layers = [
        replace(layer, information_corrected=value) for layer, value in zip(one.layers, (0.5, None, 0.1), strict=True)
    ]
    assert mean_of(replace(one, layers=layers), about) == pytest.approx(0.3)
    assert math.isnan(mean_of(replace(one, layers=[]), about))
    ratios = [one.arrays.counts_DLE[:, i].sum(0) for i in range(3)]
    assert straggler(one) == pytest.approx(sum(load.max() / load.mean() for load in ratios) / 3)


@pytest.mark.parametrize(
    ("informations", "says"),
    [
        ((0.2,), "the experts tell domains apart (0.200 nats"),
        ((0.005,), "do not tell domains apart"),
        ((0.2, 0.1), "most in m0 (0.200 nats), least in m1 (0.100)"),
        ((0.2, 0.195), "as well in all of these models"),
        ((0.005, 0.001), "In none of these models"),
    ],
)
def test_the_headline_is_told_against_chance(informations, says):
    found = []
    for index, value in enumerate(informations):
        one = called(f"m{index}")
        layers = [replace(layer, information_corrected=value, information_shuffled=0.004) for layer in one.layers]
        found.append(replace(one, layers=layers))
    assert says in headline_of(name_inspections(found))


def test_json_has_the_frequencies_and_no_array(inspections):
    data = json.loads(json.dumps(inspections_json(name_inspections(inspections))))
    assert [one["name"] for one in data] == ["sharp", "blunt"]
    assert data[1]["frequency"][0][1][2] == pytest.approx(inspections[1].frequency_DLE()[0, 1, 2], abs=1e-6)
    assert set(data[0]) == {"name", "step", "facts", "domains", "layers", "frequency", "problems"}
