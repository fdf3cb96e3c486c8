"""A claim's file: what it may say, which runs follow from it, and what is wrong with a bad one, by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from equipoise.errors import ConfigError, DataError
from equipoise.evidence.claim import BASE_NAME, read_claim, read_claims
from equipoise.lab.config.schema import RunConfig
from equipoise.lab.config.strategies import strategy_of
from unit.evidence._made import CLAIM, claim_in

EVIDENCE = Path(__file__).resolve().parents[3] / "evidence"


def test_a_claim_says_which_runs_it_needs(tmp_path):
    claim = claim_in(
        tmp_path, seeds=3, more='settings = { "model.experts" = 4 }\nbaseline_settings = { "train.lr" = 1e-3 }'
    )
    runs = claim.runs()
    assert [(run.strategy, run.train.seed) for run in runs] == [
        (name, seed) for seed in range(3) for name in ("micro", "global")
    ]
    assert {run.model.experts for run in runs} == {4} and {run.train.steps for run in runs} == {4}
    assert {run.train.lr for run in runs if run.strategy == "micro"} == {1e-3}
    assert {run.train.lr for run in runs if run.strategy == "global"} == {3e-3}


def test_contrasts_share_runs(tmp_path):
    more = '[[contrast]]\ncell = "base"\ntreated = "shuffle"\nbaseline = "micro"\nseeds = 2'
    assert len(claim_in(tmp_path, seeds=2, more=more).runs()) == 6  # of 8: micro serves both


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"criterion": "smaller"}, "criterion"),
        ({"criterion": "lower", "more": 'measur = "loss"'}, "measur"),
        ({"criterion": "lower", "more": 'measure = "los"'}, "did you mean 'loss'"),
        ({"criterion": "equal"}, "with margin or margin_of"),
        ({"criterion": "lower", "more": "margin = 0.1"}, "with no other criterion"),
        ({"criterion": "equal", "more": 'margin_of = { treated = "global" }'}, "treated, baseline, share"),
        ({"criterion": "equal", "more": 'margin_of = { cell = "bse", share = 0.1 }'}, "did you mean 'base'"),
        ({"criterion": "lower", "more": "around = 0.1"}, 'around with criterion = "equal"'),
        ({"seeds": 0}, "seeds of 1 or more"),
        ({"family": "first"}, "family"),
        ({"more": 'settings = { "train.step" = 3 }'}, r"train\.step"),
        ({"more": 'settings = { "model.top_k" = 9 }'}, r"model\.top_k <= model\.experts"),
        ({"base": "[train]\nstep = 4"}, r"train\.step"),
    ],
)
def test_what_a_claim_must_not_say(tmp_path, wrong, said):
    with pytest.raises(ConfigError, match=said):
        claim_in(tmp_path, **wrong)


def test_the_error_names_the_file(tmp_path):
    with pytest.raises(ConfigError, match=r"in T1-wide\.toml"):
        claim_in(tmp_path, criterion="smaller")


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        read_claim(tmp_path / "absent.toml")
    (tmp_path / "T1.toml").write_text(CLAIM.format(criterion="lower", seeds=1, more="", family="primary"))
    with pytest.raises(DataError, match=BASE_NAME):
        read_claim(tmp_path / "T1.toml")
    with pytest.raises(DataError, match="inside a clone"):
        read_claims(tmp_path / "empty")


def test_one_name_twice(tmp_path):
    claim_in(tmp_path)
    (tmp_path / "T1-again.toml").write_text((tmp_path / "T1-wide.toml").read_text())
    with pytest.raises(ConfigError, match="T1 in two files"):
        read_claims(tmp_path)


def test_every_claim_of_the_repository_can_be_trained():
    claims = read_claims(EVIDENCE)
    assert [claim.name for claim in claims if claim.family == "primary"] == ["E01", "E04", "E08"]
    for claim in claims:
        for run in claim.runs():
            if isinstance(run, RunConfig) and run.train.seed == 0:  # an experiment is checked when the claim is read
                strategy_of(run).check(run)
