"""Behind a contrast: domains against scipy's paired intervals, curves by hand, and what is counted once."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import fmean, stdev

import pytest
from scipy import stats

from equipoise.evidence.breakdown import by_domain, core_hours, distinct_runs, noise, over_steps
from equipoise.evidence.verdict import judge_all
from unit.evidence._made import claim_in, run_of

TREATED = {"docs": [3.1, 3.2, 3.35], "code": [2.9, 3.0, 2.8]}
BASELINE = {"docs": [3.2, 3.25, 3.3], "code": [2.85, 3.1, 2.95]}


def judged_with(claim, *, seeds=3, **others):
    runs = [
        run_of(claim, side, seed, fmean(of[name][seed] for name in of), loss={name: of[name][seed] for name in of},
               evaluations=[[2.0, 4.0 + seed], [4.0, of["docs"][seed]]],
               trail=[[2.0, 5.0, 1.0 + seed], [4.0, 4.0, 0.5 * seed]], **others.get(side, {}))
        for side, of in (("treated", TREATED), ("baseline", BASELINE))
        for seed in range(seeds)
    ]  # fmt: skip
    return judge_all([claim], runs)[0].judged[0]


def test_domains_are_paired_by_seed(tmp_path):
    found = by_domain(judged_with(claim_in(tmp_path)))
    assert list(found) == ["docs", "code"]
    for name, difference in found.items():
        test = stats.ttest_rel(TREATED[name], BASELINE[name])
        low, high = test.confidence_interval(0.95)
        assert difference.n == 3
        assert [difference.low, difference.high] == pytest.approx([low, high], rel=1e-4)
        assert difference.mean == pytest.approx(fmean(TREATED[name]) - fmean(BASELINE[name]))


def test_a_domain_that_one_side_lacks_and_a_run_that_diverged_are_left_out(tmp_path):
    claim = claim_in(tmp_path)
    one = judged_with(claim)
    treated = {seed: replace(run, loss={"docs": run.loss["docs"]}) for seed, run in one.runs["treated"].items()}
    treated[2] = replace(treated[2], status="diverged", loss={}, evaluations=[], trail=[[2.0, 5.0, 9.0]])
    one = replace(one, runs={**one.runs, "treated": treated})
    found = by_domain(one)
    assert list(found) == ["docs"] and list(found["docs"].by_seed) == [0, 1]
    steps = over_steps(one)
    assert steps.difference is not None and steps.difference.mean[-1] == pytest.approx(fmean([-0.1, -0.05]))
    assert steps.maxvio["treated"] is not None and steps.maxvio["treated"].mean == pytest.approx([1.5, 0.25])
    assert by_domain(replace(one, runs={"treated": {}, "baseline": {}})) == {}


def test_curves_are_means_and_extremes_of_the_seeds(tmp_path):
    steps = over_steps(judged_with(claim_in(tmp_path)))
    loss, maxvio = steps.loss["treated"], steps.maxvio["baseline"]
    assert loss is not None and maxvio is not None and steps.difference is not None
    assert loss.steps == [2, 4] and loss.mean == pytest.approx([5.0, fmean(TREATED["docs"])])
    assert (loss.low, loss.high) == ([4.0, 3.1], [6.0, 3.35])
    assert maxvio.mean == pytest.approx([2.0, 0.5]) and maxvio.high == [3.0, 1.0]
    assert steps.difference.mean == pytest.approx([0.0, fmean(TREATED["docs"]) - fmean(BASELINE["docs"])])
    single = over_steps(judged_with(claim_in(tmp_path), seeds=1))
    assert single.difference is None and single.loss["treated"] is not None and single.loss["treated"].low is None


def test_a_run_is_counted_once_however_many_claims_share_it(tmp_path):
    claim = claim_in(tmp_path)
    one = judged_with(claim, baseline={"seconds": 3600.0}, treated={"seconds": math.nan})
    judged = judge_all([claim, replace(claim, name="T2")], [run for side in one.runs.values() for run in side.values()])
    assert len(distinct_runs(judged)) == 6 and core_hours(judged) == 3.0


def test_noise_is_the_spread_between_seeds(tmp_path):
    claim = claim_in(tmp_path)
    one = judged_with(claim)
    judged = judge_all([claim, claim], [run for side in one.runs.values() for run in side.values()])
    (found,) = noise(judged)  # a cell once
    assert found.pairs == 3 and found.where == "base"
    differences = [fmean(TREATED[n][s] - BASELINE[n][s] for n in TREATED) for s in range(3)]
    assert found.sd == pytest.approx(stdev(differences))
    assert found.sees == sorted(found.sees, reverse=True)  # more pairs see smaller differences
