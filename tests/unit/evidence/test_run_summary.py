"""Which run is which, and that a record on disk gives back what was written."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from equipoise.errors import DataError
from equipoise.evidence import run_summary
from equipoise.evidence.run_summary import (
    MEASURES,
    lacks,
    predicted_step_cost,
    read_summaries,
    run_key,
    write_summaries,
)
from equipoise.lab.config.schema import RunConfig, TrainConfig
from equipoise.plan.cluster import Cluster
from equipoise.plan.cost import work
from unit.evidence._made import claim_in, run_of, runs_of


def test_a_key_is_of_what_decides_the_numbers(monkeypatch):
    one = RunConfig()
    same = [TrainConfig(seed=3), TrainConfig(log=("wandb",)), TrainConfig(tensorboard=False), TrainConfig(load_every=1),
            TrainConfig(checkpoint_every=7), TrainConfig(eval_every=3)]  # fmt: skip
    assert {run_key(replace(one, train=train)) for train in same} == {run_key(one)}
    other = [replace(one, train=TrainConfig(threads=2)), replace(one, train=TrainConfig(steps=9)),
             replace(one, strategy="micro"), replace(one, model=replace(one.model, init_std=0.04)),
             replace(one, train=TrainConfig(eval_sequences=8))]  # fmt: skip
    assert len({run_key(config) for config in [one, *other]}) == len(other) + 1
    before = run_key(one)
    monkeypatch.setattr(run_summary, "NUMERICS", run_summary.NUMERICS + 1)
    assert run_key(one) != before


def test_a_new_setting_does_not_rename_the_runs_on_record():
    config = RunConfig(strategy="micro", train=TrainConfig(precision="fp32"))
    assert run_key(config) == "fffec64f9c", "put a new setting into LATER, with the value that changes nothing"


def test_a_setting_that_came_later_counts_where_it_is_used(monkeypatch):
    before = run_key(RunConfig())
    monkeypatch.setattr(run_summary, "LATER", {"model.zero_attention": False})
    without = run_key(RunConfig())
    assert without != before  # as if the setting had never been
    model = replace(RunConfig().model, zero_attention=True)
    assert run_key(replace(RunConfig(), model=model)) not in (before, without)


def test_records_come_back_and_stay(tmp_path):
    claim = claim_in(tmp_path / "claims")
    runs = runs_of(claim, [-0.01, -0.02])
    write_summaries(tmp_path / "records", runs[:2])
    write_summaries(tmp_path / "records", runs[2:])
    back = read_summaries(tmp_path / "records")
    assert sorted(back, key=repr) == sorted(runs, key=repr)
    assert len(list((tmp_path / "records").iterdir())) == 2  # one file a strategy
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()}
    write_summaries(tmp_path / "records", runs)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "records").iterdir()} == before


def test_a_measure_that_came_later_rewrites_no_earlier_run(tmp_path):
    claim = claim_in(tmp_path / "claims")
    early, late = run_of(claim, "treated", 0, 3.0), run_of(claim, "treated", 1, 3.0, step_cost=0.25)
    write_summaries(tmp_path, [early])
    (path,) = tmp_path.glob("*.jsonl")
    before = path.read_text()
    write_summaries(tmp_path, [late])
    assert path.read_text().startswith(before) and "step_cost" not in before
    assert [MEASURES["step_cost"][1](run) for run in read_summaries(tmp_path)] == [
        pytest.approx(math.nan, nan_ok=True),
        0.25,
    ]


def test_loss_by_frequency_of_later_runs_and_none_of_earlier_ones(tmp_path):
    claim = claim_in(tmp_path / "claims")
    early = run_of(claim, "treated", 0, 3.0)
    late = run_of(claim, "treated", 1, 3.0, loss_by_frequency={"input": [2.0, 3.0, 4.0], "target": [1.0, 5.0, 9.0]})
    write_summaries(tmp_path, [early, late])
    (path,) = tmp_path.glob("*.jsonl")
    assert "loss_by_frequency" not in path.read_text().splitlines()[0]
    first, second = read_summaries(tmp_path)
    wanted = {"loss_rare": 4.0, "loss_frequent": 2.0, "loss_rare_target": 9.0, "loss_frequent_target": 1.0}
    for name, value in wanted.items():
        assert MEASURES[name][1](second) == value
        assert math.isnan(MEASURES[name][1](first))
        assert lacks(first, name) and not lacks(second, name)
    assert not lacks(first, "loss") and not lacks(first, "maxvio")
    assert not lacks(replace(first, status="diverged"), "loss_rare")
    assert lacks(replace(first, active_width=math.nan), "active_width") and not lacks(
        replace(first, active_width=128.0), "active_width"
    )


def test_a_run_again_takes_the_place_of_the_old_one(tmp_path):
    claim = claim_in(tmp_path / "claims")
    write_summaries(tmp_path, [run_of(claim, "treated", 0, 3.0)])
    write_summaries(tmp_path, [run_of(claim, "treated", 0, 2.0)])
    assert [run.mean_loss for run in read_summaries(tmp_path)] == [2.0]


def test_a_half_written_line_is_named(tmp_path):
    claim = claim_in(tmp_path / "claims")
    write_summaries(tmp_path, [run_of(claim, "treated", 0, 3.0)])
    (path,) = tmp_path.glob("*.jsonl")
    path.write_text(path.read_text() + '{"key": "12')
    with pytest.raises(DataError, match=r"line 2 of .*global.*\n.*\n.*remove the line"):
        read_summaries(tmp_path)


def test_a_diverged_run_has_every_measure_but_no_number(tmp_path):
    nan = float("nan")
    run = run_of(claim_in(tmp_path), "treated", 0, nan, status="diverged", loss={}, information=nan, topk_score=nan,
                 maxvio=dict.fromkeys(("global", "micro_batch", "sequence"), nan), training={})  # fmt: skip
    values = {name: read(run) for name, (_, read) in MEASURES.items()}
    assert all(value != value for value in values.values())


def test_the_step_of_the_slowest_of_four_ranks():
    """By hand: 4 of 8 tokens go to the first of 4 ranks, so it takes twice the mean, and so do all that wait for it."""
    cluster = Cluster(experts=8, top_k=1, ep=4)
    one = work(cluster)
    for counts_E, factor in (([2, 2, 1, 1, 1, 0, 1, 0], 2.0), ([2, 0, 0, 2, 1, 1, 2, 0], 1.0)):
        slower = (one.dense + factor * one.waited) / (one.dense + one.waited) - 1
        assert predicted_step_cost([[counts_E]], top_k=1) == pytest.approx(slower, rel=0.02, abs=1e-3)
    apart = [[[4, 4, 0, 0, 0, 0, 0, 0]], [[0, 0, 4, 4, 0, 0, 0, 0]]]  # two domains, each on a rank of its own
    assert predicted_step_cost(apart, top_k=1) > predicted_step_cost([[[1, 1, 1, 1, 0, 0, 0, 0]]], top_k=1)
    assert math.isnan(predicted_step_cost([[[1, 1, 1]]], top_k=1))


def test_measures_that_came_later_are_in_no_older_record(tmp_path):
    claim = claim_in(tmp_path / "claims")
    (run, *_) = runs_of(claim, [-0.01])
    for name in run_summary.LATE_MEASURES:
        assert name not in run_summary._plain_record(run)
        assert run_summary._plain_record(replace(run, **{name: 1.5}))[name] == 1.5
        if name in MEASURES:
            assert math.isnan(MEASURES[name][1](run)) and MEASURES[name][1](replace(run, **{name: 1.5})) == 1.5
