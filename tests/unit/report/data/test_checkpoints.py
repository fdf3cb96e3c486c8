"""Checkpoints of one model: put in the order of training, and what changed between them, against plain loops."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from equipoise.report.data.checkpoints import (
    LAYER_MEASURES,
    churn_between,
    headline_with_time,
    in_full,
    left_out,
    over_training,
    series_of,
)
from equipoise.report.data.inspections import name_inspections
from equipoise.storage.inspection_record import INSPECTION_NAME, read_inspection, write_inspection
from unit.report.synthetic_inspection import synthetic_checkpoints, synthetic_inspection

BY_LABEL = {measure.label: measure for measure in LAYER_MEASURES}


def named(inspections):
    return name_inspections(inspections)


def test_checkpoints_of_one_model_are_sorted_by_step_and_others_left_alone():
    found = synthetic_checkpoints((300, 20, 100))
    other = synthetic_inspection(model="models/other/checkpoint-7")
    (series,) = series_of(named([found[0], other, *found[1:]]))
    assert (series.name, series.steps) == ("tiny", [20, 100, 300])
    assert [one.inspection.facts.model for one in series.checkpoints] == [
        f"models/tiny/checkpoint-{step}" for step in (20, 100, 300)
    ]
    assert series_of(named([found[0], other])) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda one: replace(one, facts=replace(one.facts, data="other.jsonl")),
        lambda one: replace(one, facts=replace(one.facts, model="models/elsewhere/checkpoint-100")),
        lambda one: replace(one, facts=replace(one.facts, model="models/tiny/final")),
        lambda one: replace(one, layers=one.layers[:1]),
        lambda one: replace(one, domains=one.domains[::-1]),
    ],
)
def test_what_differs_in_more_than_the_step_is_no_checkpoint_of_it(change):
    first, second = synthetic_checkpoints((20, 100))
    assert series_of(named([first, second])) and not series_of(named([first, change(second)]))


def test_two_looks_at_the_same_step_are_no_training():
    first, second = synthetic_checkpoints((20, 100))
    again = replace(second, facts=replace(second.facts, step=20))
    assert series_of(named([first, again])) == []


def test_a_run_that_was_inspected_at_several_steps_has_them_in_its_names():
    found = [
        replace(one, facts=replace(one.facts, model="runs/mine", step=step))
        for one, step in zip(synthetic_checkpoints((1, 2)), (20, 100), strict=True)
    ]
    assert [one.name for one in named(found)] == ["mine step 20", "mine step 100"]
    assert series_of(named(found))[0].name == "mine"


def test_churn_between_are_those_that_a_loop_counts():
    first, second = synthetic_checkpoints((20, 100))
    old, new = first.arrays.passage_experts_NSLK.copy(), second.arrays.passage_experts_NSLK.copy()
    old[0, 0, 0], new[0, 0, 0] = (3, 5), (5, 3)  # another order is no other choice
    new[1, 2, :] = -1  # no choice is neither kept nor changed
    first, second = (
        replace(one, arrays=replace(one.arrays, passage_experts_NSLK=experts))
        for one, experts in ((first, old), (second, new))
    )
    N, S, L, K = new.shape
    for layer, share in enumerate(churn_between(first, second)):
        chosen = [(n, s, k) for n in range(N) for s in range(S) for k in range(K) if new[n, s, layer, k] >= 0]
        changed = sum(new[n, s, layer, k] not in old[n, s, layer] for n, s, k in chosen)
        assert share == pytest.approx(changed / len(chosen)) and 0 < share < 1
    assert churn_between(second, second).tolist() == [0.0] * L


def test_choices_of_other_text_are_not_compared():
    first, second = synthetic_checkpoints((20, 100))
    ids = second.arrays.passage_ids_NS.copy()
    ids[0, 0] += 1
    other = replace(second, arrays=replace(second.arrays, passage_ids_NS=ids))
    assert np.isnan(churn_between(first, other)).all()
    shorter = replace(second, arrays=replace(second.arrays, passage_ids_NS=ids[:, :4]))
    assert np.isnan(churn_between(first, shorter)).all()


def test_a_curve_is_the_mean_of_the_layers_between_the_lowest_and_the_highest():
    (series,) = series_of(named(synthetic_checkpoints((20, 100, 300))))
    curve, floor = over_training(series, BY_LABEL["MaxVio, all text"])
    for at, one in enumerate(series.checkpoints):
        values = [layer.maxvio_global for layer in one.inspection.layers]
        assert (curve.low[at], curve.high[at]) == (min(values), max(values))
        assert curve.mean[at] == pytest.approx(sum(values) / len(values))
    assert floor.mean == pytest.approx([0.02] * 3)
    dead, _ = over_training(series, BY_LABEL["Dead experts, all layers"])
    assert dead.low is None
    assert dead.mean == [sum(len(layer.dead) for layer in one.inspection.layers) for one in series.checkpoints]
    changed, _ = over_training(series, BY_LABEL["Routing churn since the checkpoint before"])
    assert changed.steps == [100, 300]  # before the first there is none
    alike, _ = over_training(series, BY_LABEL["Likeness of two experts' weights, the most alike"])
    pairs = series.checkpoints[1].inspection.arrays.weight_similarity_LEE[0]
    most = max(pairs[i, j] for i in range(16) for j in range(16) if i != j)
    assert alike.low[1] <= most <= alike.high[1]
    assert over_training(series, BY_LABEL["Saturation"]) == (None, None)


def test_what_some_layers_or_checkpoints_lack_is_left_out():
    first, second, third = synthetic_checkpoints((20, 100, 300))
    none = replace(second, layers=[replace(layer, information_corrected=None) for layer in second.layers])
    some = replace(third, layers=[replace(third.layers[0], information_corrected=None), *third.layers[1:]])
    (series,) = series_of(named([first, none, some]))
    curve, _ = over_training(series, BY_LABEL["Domain information, nats"])
    assert curve.steps == [20, 300]
    assert curve.mean[1] == pytest.approx(np.mean([layer.information_corrected for layer in third.layers[1:]]))


def test_of_many_checkpoints_the_ends_are_shown_in_full():
    few = named(synthetic_checkpoints((1, 2, 3)))
    many = named([*synthetic_checkpoints((1, 2, 3, 4, 5)), synthetic_inspection(model="models/other")])
    assert in_full(few) == few and left_out(series_of(few)[0]) == ""
    assert [one.name for one in in_full(many)] == ["checkpoint-1", "checkpoint-5", "other"]
    assert "the first and the last of the 5 checkpoints of tiny" in left_out(series_of(many)[0])


def test_the_headline_is_what_training_did():
    found = synthetic_checkpoints((20, 1000))
    text = headline_with_time(named(found))
    means = [sum(layer.maxvio_global for layer in one.layers) / len(one.layers) for one in found]
    assert text.startswith(f"tiny from step 20 to 1,000: MaxVio over all text {means[0]:.2f} to {means[1]:.2f}, ")
    assert "Experts tell domains apart" in headline_with_time(named([found[0], synthetic_inspection(model="other")]))


def test_a_record_from_before_steps_were_kept_is_read(tmp_path):
    one = synthetic_inspection(model="models/tiny/checkpoint-20")
    write_inspection(tmp_path, one)
    head = json.loads((tmp_path / INSPECTION_NAME).read_text())
    assert head["facts"].pop("step") is None
    (tmp_path / INSPECTION_NAME).write_text(json.dumps(head))
    found = read_inspection(tmp_path)
    assert found.facts == one.facts
    assert named([found])[0].step == 20
    assert math.isclose(found.layers[0].maxvio_global, one.layers[0].maxvio_global)
