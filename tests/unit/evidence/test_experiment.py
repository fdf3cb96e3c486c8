"""A claim about an experiment: run in processes of its own, kept, judged, and what is wrong with a bad one, by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.errors import ConfigError, DataError
from equipoise.evidence import run_summary
from equipoise.evidence.experiment import TrialJob, experiment_of, read_outcome, run_trial, trial_of
from equipoise.evidence.reproduce import check_for_ray
from equipoise.evidence.run_summary import RunSummary, read_summaries, run_key, summarize_outcome, write_summaries
from equipoise.evidence.verdict import judge_all
from equipoise.lab.comparison.workers import PARENT
from unit.evidence import _toy
from unit.evidence._made import claim_in

TOY = "unit.evidence._toy"
CLAIM = f"""\
name = "T1"
title = "A shift shows"
question = "Does it?"
source = "nobody"
published = "-1"

[[contrast]]
cell = "base"
experiment = "{TOY}"
treated = "shifted"
baseline = "plain"
measure = "mean"
criterion = "lower"
settings = {{ draws = 5 }}
seeds = 2

[[contrast]]
cell = "base"
experiment = "{TOY}"
treated = "shifted"
baseline = "plain"
settings = {{ draws = 5 }}
seeds = 2
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))


def test_a_claim_from_nothing_to_the_page(tmp_path, capsys):
    claim_in(tmp_path / "evidence", text=CLAIM)
    where = ["--evidence", str(tmp_path / "evidence"), "--runs", str(tmp_path / "runs"),
             "--page", str(tmp_path / "page.md"), "--html", str(tmp_path / "page.html")]  # fmt: skip
    assert main(["reproduce", "--all", *where]) == 0
    said = capsys.readouterr()
    assert "4 runs to train" in said.err and "verdict: confirmed" in said.out
    runs = read_summaries(tmp_path / "evidence" / "records")
    assert len(runs) == 4 and {run.strategy for run in runs} == {f"{TOY} plain", f"{TOY} shifted"}
    by_hand = _toy.run("shifted", _toy.Settings(draws=5), 1, tmp_path)
    (found,) = [run for run in runs if run.seed == 1 and run.strategy.endswith("shifted")]
    assert found.numbers == {name: pytest.approx(value, rel=1e-5) for name, value in by_hand.numbers.items()}
    assert found.corpus == "t0y" and found.tokens == 5 and found.seconds >= 0
    assert found.mean_loss == pytest.approx(by_hand.numbers["mean"] + 3.5, rel=1e-5)
    assert not list((tmp_path / "runs").glob("*seed*"))
    page = (tmp_path / "page.md").read_text()
    assert "mean (units)" in page and "By domain" not in page.partition("base | shifted - plain | mean")[0]
    assert "-1.000 (-1.000 to -1.000)" in page
    assert "units" in (tmp_path / "page.html").read_text()
    assert main(["reproduce", "--all", *where]) == 0
    assert "0 runs to train" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_text() == page


def test_a_trial_that_fails_is_no_result(tmp_path, capsys):
    claim_in(tmp_path / "evidence", text=CLAIM.replace("draws = 5", "draws = 0"))
    where = ["--evidence", str(tmp_path / "evidence"), "--runs", str(tmp_path / "runs")]
    assert main(["reproduce", "T1", *where]) == 1
    assert "fmean requires at least one data point" in capsys.readouterr().err
    assert not (tmp_path / "evidence" / "records").exists()


def test_records_hold_what_there_is_and_come_back(tmp_path):
    trial = trial_of(TOY, "shifted", {}, 2)
    outcome = _toy.run("shifted", trial.settings, 2, tmp_path)
    found = summarize_outcome(replace(outcome, corpus="t0y"), trial)
    write_summaries(tmp_path / "records", [found])
    (path,) = (tmp_path / "records").iterdir()
    held = {"key", "seed", "corpus", "strategy", "status", "loss", "numbers", "tokens", "seconds", "torch"}
    assert json.loads(path.read_text()).keys() == held
    assert [one.numbers for one in read_summaries(tmp_path / "records")] == [found.numbers]


def test_records_of_trainings_stay_as_they_are(tmp_path):
    records = Path(__file__).resolve().parents[3] / "evidence" / "records"
    for path in sorted(records.iterdir())[:5]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    other = RunSummary(key="0", seed=0, corpus="c", strategy="none", status="finished", numbers={"mean": 1.0})
    write_summaries(tmp_path, [other])
    assert {path: path.read_bytes() for path in before} == before and len(list(tmp_path.iterdir())) == len(before) + 1


def test_a_key_is_of_what_decides_the_numbers(monkeypatch):
    trials = [trial_of(TOY, "plain", {}, 0), trial_of(TOY, "shifted", {}, 0), trial_of(TOY, "plain", {"draws": 9}, 0),
              trial_of(TOY, "plain", {"data": "a"}, 0)]  # fmt: skip
    assert len({run_key(trial) for trial in trials}) == len(trials)
    assert run_key(trial_of(TOY, "plain", {}, 7)) == run_key(trials[0])
    assert run_key(trial_of(TOY, "plain", {"data": "b"}, 0)) == run_key(trials[3])  # its digest is on record
    before = run_key(trials[0])
    monkeypatch.setattr(run_summary, "LATER", {f"{TOY}.draws": 4})
    assert run_key(trials[0]) != before  # as if the setting had never been
    monkeypatch.undo()
    object.__setattr__(_toy.EXPERIMENT, "version", 2)
    try:
        assert run_key(trials[0]) != before
    finally:
        object.__setattr__(_toy.EXPERIMENT, "version", 1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ((TOY, "upcycled"), "an experiment: "),
        ((TOY, "unit.evidence._absent"), "PYTHONPATH"),
        ((TOY, "unit.evidence._made"), "EXPERIMENT = Experiment"),
        (('measure = "mean"', 'measure = "maen"'), "did you mean 'mean'"),
        (('measure = "mean"', 'measure = "information"'), "a measure: loss, mean"),
        (('baseline = "plain"', 'baseline = "plian"'), "did you mean 'plain'"),
        (("draws = 5", "drawn = 5"), "did you mean draws"),
        (("draws = 5", "draws = 0.5"), "a whole number"),
    ],
)
def test_what_a_claim_must_not_say(tmp_path, change, said):
    with pytest.raises(ConfigError, match=said):
        claim_in(tmp_path, text=CLAIM.replace(*change))


def test_what_a_worker_is_not_given(tmp_path):
    with pytest.raises(DataError, match=r"trial\.json"):
        run_trial(tmp_path)
    with pytest.raises(DataError, match=r"worker\.log"):
        read_outcome(tmp_path)
    with pytest.raises(ConfigError, match="leave --on ray out"):
        check_for_ray([trial_of(TOY, "plain", {}, 0)])
    assert experiment_of(TOY) is _toy.EXPERIMENT


def test_a_worker_ends_with_its_parent(tmp_path):
    job = TrialJob("slow", tmp_path, trial_of(TOY, "slow", {}, 0))
    command = [sys.executable, "-m", "equipoise", *job.arguments()]
    process = subprocess.run(command, env=os.environ | {PARENT: "0"}, timeout=300, capture_output=True, text=True)
    assert process.returncode == 130 and "stopped" in process.stderr
    assert not (tmp_path / "outcome.json").exists()


def test_two_numbers_of_one_run_are_compared(tmp_path):
    """A run that measured both is run once a seed, and each side reads its own."""
    text = (
        CLAIM.partition("[[contrast]]")[0]
        + f"""\
[[contrast]]
cell = "base"
experiment = "{TOY}"
treated = "shifted"
baseline = "shifted"
measure = "mean"
baseline_measure = "only shifted"
criterion = "lower"
settings = {{ draws = 5 }}
seeds = 3
"""
    )
    claim = claim_in(tmp_path / "evidence", text=text)
    trials = claim.runs()
    assert [trial.seed for trial in trials] == [0, 1, 2]
    found = [summarize_outcome(_toy.run("shifted", one.settings, one.seed, tmp_path), one) for one in trials]
    (judged,) = judge_all([claim], found)[0].judged
    assert judged.difference is not None and judged.pairs == 3
    by_seed = {run.seed: 2 * run.numbers["mean"] for run in found}  # the other is its negative
    assert judged.difference.by_seed == pytest.approx(by_seed)
    assert judged.treated == pytest.approx(-judged.baseline) and judged.contrast.measured == "mean - only shifted"


def test_two_numbers_of_different_units_are_not(tmp_path):
    text = CLAIM.replace('measure = "mean"', 'measure = "mean"\nbaseline_measure = "loss"')
    with pytest.raises(ConfigError, match="numbers of one unit"):
        claim_in(tmp_path / "evidence", text=text)
