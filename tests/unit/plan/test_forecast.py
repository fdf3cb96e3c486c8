"""All numbers of a plan: every strategy on the cluster, and how they grow with the ranks."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from equipoise.errors import ConfigError
from equipoise.plan.cluster import Cluster
from equipoise.plan.forecast import forecast, growth_sizes, to_json
from equipoise.plan.loads import Skew
from equipoise.plan.typical_skews import Strategy, typical

C = Cluster(gpus=32, ep=16, experts=32, layers=3, micro_batches=2, sync="step")


def test_even_loads_cost_the_sums_alone():
    plan = forecast(replace(C, micro_batches=4), [Strategy("law", Skew()), *typical()], up_to=0)
    even, rows = plan.even.total, {one.name: one for one in plan.rows}
    assert rows["law"].cost == pytest.approx(0, abs=0.03)  # noise of uniform routing
    assert all(one.time.total > even for one in plan.rows)
    assert rows["global+micro"].cost < rows["global"].cost < rows["none"].cost


def test_growth_divides_the_experts_then_copies_them():
    assert growth_sizes(96, 400) == [2, 4, 8, 16, 32, 96, 192, 384]
    assert growth_sizes(7, 30) == [7, 14, 28]
    plan = forecast(Cluster(experts=12, ep=4), typical()[:1], up_to=48)
    assert [(one.ep, one.experts_per_rank, one.replicas, one.gpus) for one in plan.growth] == [
        (2, 6, 1, 64), (4, 3, 1, 64), (12, 1, 1, 72), (24, 1, 2, 72), (48, 1, 4, 96)
    ]  # fmt: skip


def test_a_plan_needs_a_strategy():
    with pytest.raises(ConfigError, match="at least one strategy"):
        forecast(C, [])


def test_json_holds_the_total_of_every_row():
    plan = forecast(C, typical()[:2], up_to=4, notes=["a note"])
    data = json.loads(json.dumps(to_json(plan), allow_nan=False))
    assert [one["step_seconds"] for one in data["strategies"]] == [one.time.total for one in plan.rows]
    assert [[row["name"] for row in one["rows"]] for one in data["growth"]] == [["none", "micro"]] * 2
    assert data["notes"] == ["a note"]
