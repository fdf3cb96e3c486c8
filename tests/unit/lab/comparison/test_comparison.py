"""The plan, the manifest and the folder rules of a comparison; tests/unit/cli/test_compare.py trains for real."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime

import pytest

from equipoise.errors import ConfigError, OutputError
from equipoise.lab.comparison.comparison import (
    MANIFEST_NAME,
    find_unfinished,
    new_folder,
    open_comparison,
    plan,
    read_manifest,
)
from equipoise.lab.comparison.workers import Job
from equipoise.lab.config.schema import CompareConfig, StrategyConfig, TrainConfig
from equipoise.storage.codec import encode
from equipoise.storage.locks import locked

TWO = CompareConfig(strategies=("micro", "global"), seeds=1)
OWN = StrategyConfig(name="own", policies=({"kind": "ZLoss", "coef": 0.1},))


def saved(folder, config=TWO, states=("finished", "finished")):
    comparison = open_comparison(folder, config)
    for job, state in zip(comparison.jobs, states, strict=True):
        job.status = state
        job.folder.mkdir(exist_ok=True)
        (job.folder / "run.toml").touch()
    comparison.save()
    return comparison


def test_runs_of_a_seed_differ_in_nothing_but_the_strategy(tmp_path):
    config = replace(TWO, strategies=("micro", "loss-free", "own"), strategy=(OWN,), seeds=2, train=TrainConfig(seed=7))
    jobs = plan(config, tmp_path)
    assert [(job.config.strategy, job.config.train.seed) for job in jobs] == [
        ("micro", 7), ("loss-free", 7), ("own", 7), ("micro", 8), ("loss-free", 8), ("own", 8)
    ]  # fmt: skip
    same = [replace(job.config, strategy="", policies=()) for job in jobs[:3]]
    assert same[0] == same[1] == same[2]
    assert len({job.folder for job in jobs}) == 6


def test_a_comparison_stopped_at_any_time_is_one_of_whole_seeds(tmp_path):
    jobs = plan(CompareConfig(), tmp_path)
    seeds = [job.config.train.seed for job in jobs]
    assert seeds == sorted(seeds)
    assert {seeds.count(seed) for seed in seeds} == {len(CompareConfig().strategies)}
    assert len(set(seeds)) >= 5  # fewer give an interval that tells nothing


@pytest.mark.parametrize(
    "config",
    [
        replace(TWO, strategies=("micro", "globl")),
        replace(TWO, strategies=("a:b", "a_b"), strategy=(replace(OWN, name="a:b"), replace(OWN, name="a_b"))),
        replace(TWO, strategy=(replace(OWN, name="micro"),)),
    ],
    ids=["unknown", "same folder", "takes a name"],
)
def test_names_that_cannot_work_are_refused(config, tmp_path):
    with pytest.raises(ConfigError):
        plan(config, tmp_path)


def test_a_new_folder_never_is_an_old_one(tmp_path):
    now = datetime(2026, 1, 2, 3, 4, 5)
    first = new_folder(tmp_path, now)
    assert first.name == "compare-20260102-030405"
    first.mkdir()
    assert new_folder(tmp_path, now) == first.with_name(first.name + "-2")


def test_the_manifest_says_what_is_compared_and_how_far_it_is(tmp_path):
    saved(tmp_path / "c", states=("finished", "failed"))
    manifest = json.loads((tmp_path / "c" / MANIFEST_NAME).read_text())
    assert manifest["config"] == encode(TWO)
    assert manifest["status"] == "failed"
    assert [(run["folder"], run["status"]) for run in manifest["runs"]] == [
        ("micro-seed0", "finished"),
        ("global-seed0", "failed"),
    ]


def test_an_earlier_comparison_grows_by_strategies_and_seeds(tmp_path):
    saved(tmp_path / "c")
    more = replace(TWO, strategies=("own",), strategy=(OWN,), seeds=2, workers=1)
    grown = open_comparison(tmp_path / "c", more)
    assert [job.name for job in grown.jobs] == [
        f"{name}-seed{seed}" for seed in (0, 1) for name in ("micro", "global", "own")
    ]
    grown.save()
    again = open_comparison(tmp_path / "c", TWO)
    assert again.config.strategy == (OWN,)
    with pytest.raises(OutputError, match="own"):
        open_comparison(tmp_path / "c", replace(more, strategy=(replace(OWN, gate="sigmoid"),)))


def test_another_configuration_is_refused_by_name_and_overwrite_removes_only_runs(tmp_path):
    folder = tmp_path / "c"
    saved(folder)
    (folder / "notes.txt").write_text("mine")
    longer = replace(TWO, train=TrainConfig(steps=999))
    with pytest.raises(OutputError, match=r"train\.steps = 240"):
        open_comparison(folder, longer)
    assert (folder / "micro-seed0").exists()
    opened = open_comparison(folder, longer, overwrite=True)
    assert not (folder / "micro-seed0").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert opened.config == longer


def test_results_of_another_version_are_not_mixed(tmp_path):
    saved(tmp_path / "c")
    path = tmp_path / "c" / MANIFEST_NAME
    path.write_text(path.read_text().replace('"torch": "', '"torch": "0.'))
    with pytest.raises(OutputError, match="version of torch"):
        open_comparison(tmp_path / "c", TWO)


def test_settings_that_came_later_stop_no_comparison(tmp_path):
    saved(tmp_path / "compare-1", states=("finished", "waiting"))
    path = tmp_path / "compare-1" / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    for name in ("folder", "through", "family"):
        del manifest["config"]["model"][name]
    path.write_text(json.dumps(manifest))
    assert find_unfinished(tmp_path, TWO) == tmp_path / "compare-1"
    assert len(open_comparison(tmp_path / "compare-1", TWO).jobs) == 2
    manifest["config"]["model"]["heads_of_old"] = 3
    path.write_text(json.dumps(manifest))
    assert find_unfinished(tmp_path, TWO) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 99}', "\x00"])
def test_a_broken_manifest_is_not_taken_for_none(tmp_path, text):
    (tmp_path / MANIFEST_NAME).write_text(text)
    with pytest.raises(OutputError, match="manifest"):
        open_comparison(tmp_path, TWO, overwrite=True)
    assert (tmp_path / MANIFEST_NAME).read_text() == text


def test_a_manifest_cannot_make_overwrite_leave_its_folder(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "run.toml").touch()
    saved(tmp_path / "c")
    path = tmp_path / "c" / MANIFEST_NAME
    path.write_text(path.read_text().replace("micro-seed0", "../outside"))
    open_comparison(tmp_path / "c", TWO, overwrite=True)
    assert (outside / "run.toml").exists()


def test_only_the_newest_unfinished_free_comparison_of_the_same_settings_goes_on(tmp_path):
    assert find_unfinished(tmp_path, TWO) is None
    saved(tmp_path / "compare-1", states=("finished", "interrupted"))
    assert find_unfinished(tmp_path, TWO) == tmp_path / "compare-1"
    assert find_unfinished(tmp_path, replace(TWO, workers=1)) == tmp_path / "compare-1"
    assert find_unfinished(tmp_path, replace(TWO, seeds=2)) is None
    assert find_unfinished(tmp_path) == tmp_path / "compare-1"
    with locked(tmp_path / "compare-1"):
        assert find_unfinished(tmp_path, TWO) is None
    saved(tmp_path / "compare-2")
    assert find_unfinished(tmp_path, TWO) is None
    assert read_manifest(tmp_path / "compare-2") is not None


@pytest.mark.parametrize(
    ("states", "codes", "code"),
    [(("finished", "finished"), (0, 0), 0), (("failed", "finished"), (3, 0), 3), (("failed", "failed"), (3, 5), 1),
     (("failed", "failed"), (4, 4), 4), (("failed", "finished"), (-9, 0), 1)],
)  # fmt: skip
def test_the_exit_code_is_that_of_the_failures(tmp_path, states, codes, code):
    comparison = open_comparison(tmp_path / "c", TWO)
    for job, state, ended in zip(comparison.jobs, states, codes, strict=True):
        job.status, job.exit_code = state, ended
    assert comparison.exit_code == code


def test_a_full_or_forbidden_place_is_an_output_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        open_comparison(tmp_path / "file" / "c", TWO)
    with pytest.raises(OutputError):
        open_comparison(tmp_path / "file", TWO)
    comparison = open_comparison(tmp_path / "c", TWO)
    (tmp_path / "c" / MANIFEST_NAME).mkdir()
    with pytest.raises(OutputError, match="kept"):
        comparison.save()


def test_a_job_knows_its_steps(tmp_path):
    job: Job = plan(TWO, tmp_path)[0]
    assert job.steps == TWO.train.steps
