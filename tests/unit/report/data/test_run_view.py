"""A run as of one step: which evaluation, which steps, and what does not fit the header."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.report.data.run_view import flatten, last_quarter, mean, usable, view_run
from equipoise.storage.run_record import read_run


@pytest.fixture(scope="module")
def run(folder):
    return read_run(folder / "global-s0")


@pytest.mark.parametrize(("step", "at"), [(None, 150), (150, 150), (149, 100), (60, 50)])
def test_a_view_is_of_the_last_evaluation_before_it(run, step, at):
    view = view_run(run, step)
    assert view.evaluation is not None
    assert (view.step, view.evaluation.step, view.steps[-1].step) == (at, at, at)
    assert [one.step for one in view.window] == list(range(at - at // 4 + 1, at + 1))
    values = [one.balance["balance/maxvio_global"] for one in view.window]
    assert view.trained("balance/maxvio_global") == pytest.approx(sum(values) / len(values))
    assert math.isnan(view.trained("no such metric"))


def test_one_slow_step_does_not_count(run):
    slow = replace(run, steps=[replace(one, seconds=1e6 if one.step == 7 else 2.0) for one in run.steps])
    assert view_run(slow, None).over_steps(lambda step: step.seconds) == 2.0


def test_a_quarter_is_at_least_one_step(run):
    assert [one.step for one in last_quarter(run.steps[:2])] == [2]
    assert last_quarter([]) == []


def test_shapes_that_are_not_the_headers_are_dropped_and_named(run):
    broken = replace(
        run,
        evaluations=[run.evaluations[0], replace(run.evaluations[1], counts=[[[1]]])],
        loads=[replace(run.loads[0], counts=[[-1] * 16] * 3), *run.loads[1:3]],
    )
    evaluations, loads, problems = usable(broken)
    assert (evaluations, loads) == ([run.evaluations[0]], run.loads[1:3])
    assert [text.split(" ", 1)[0] for text in problems] == ["1", "1"]


def test_names_of_nested_settings_are_dotted():
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": [1]}) == {"a.b.c": 1, "a.d": None, "e": [1]}


def test_a_mean_is_of_the_numbers_among_the_values():
    assert mean([1, 2.0, "x", None, True, math.nan, math.inf]) == 1.5
    assert math.isnan(mean([None]))
