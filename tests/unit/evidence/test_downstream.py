"""Runs that answer: which are asked, what is kept, what is refused; tests/engines/downstream has the real harness."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import pytest

from equipoise.cli import main
from equipoise.errors import ConfigError, DataError, OutputError
from equipoise.evidence import downstream
from equipoise.evidence.downstream import RESULT_NAME, Request, evaluate, finished_runs
from equipoise.evidence.downstream_tasks import OTHERS, SAME
from equipoise.evidence.harness import Answer
from equipoise.lab.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from equipoise.lab.training.trainer import train


def settings(corpus_file: Path, strategy: str, seed: int, **data) -> RunConfig:
    return RunConfig(
        model=ModelConfig(layers=1, width=16, heads=1, head_dim=16, experts=4, expert_hidden=16, vocab_size=300),
        data=DataConfig(**{"data": str(corpus_file), "sequence_length": 32} | data),
        train=TrainConfig(
            steps=2,
            micro_batches=2,
            warmup=1,
            eval_every=2,
            eval_sequences=4,
            fidelity_every=0,
            checkpoint_every=1,
            tensorboard=False,
            seed=seed,
        ),
        strategy=strategy,
    )


@pytest.fixture(scope="module")
def trained(corpus_file, tmp_path_factory) -> Path:
    """A comparison of two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "comparison.json").write_text(json.dumps({"strategies": ["micro", "global"]}))  # decides their order
    for strategy in ("micro", "global"):
        train(settings(corpus_file, strategy, 0), folder / f"{strategy}-seed0")
    return folder


class StandIn:
    """Answers by the question's number; counts what it is asked, and stops after so many calls."""

    asked: ClassVar[list[tuple[str, int]]] = []
    calls_left = -1

    def __init__(self, model: Path, tasks: Path, *, device: str, batch: int) -> None:
        assert (model / "config.json").is_file() and (tasks / f"{SAME}.yaml").is_file()

    def answer(self, task, questions):
        if StandIn.calls_left == 0:
            raise KeyboardInterrupt
        StandIn.calls_left -= 1
        StandIn.asked += [(task, question) for question in questions]
        return [Answer(question, [-1.0, -2.0, -3.0, -4.0], [-5.0] * 4, question % 3 == 0) for question in questions]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    monkeypatch.setattr(StandIn, "asked", [])
    monkeypatch.setattr(StandIn, "calls_left", -1)
    monkeypatch.setattr(downstream, "Harness", StandIn)
    monkeypatch.setattr(downstream, "require_harness", lambda: "0")
    return StandIn


def answer(folder: Path, out: Path, **more):
    return evaluate(Request(**{"questions": 20} | more), finished_runs([folder])[0], out)


def test_every_question_of_every_run_is_asked_once(trained, tmp_path, stand_in):
    found = answer(trained, tmp_path / "out")
    assert [one.strategy for one in found.runs] == ["micro", "global"] and found.baseline == "micro"
    asked = {task: len(of_task) for task, of_task in found.questions.items()}
    assert asked == {SAME: 60, OTHERS: 60}
    assert sorted(stand_in.asked) == sorted([(task, i) for task in asked for i in range(60)] * 2)
    assert found.runs[0].right[SAME] == [i % 3 == 0 for i in range(60)] and found.runs[0].step == 2
    numbers = json.loads((tmp_path / "out" / RESULT_NAME).read_text())
    assert [one["tasks"][SAME]["value"] for one in numbers["runs"]] == [pytest.approx(1 / 3)] * 2
    assert not list((tmp_path / "out").glob(".export*"))

    stand_in.asked.clear()
    assert answer(trained, tmp_path / "out") == found and not stand_in.asked


def test_stopped_at_any_moment_it_goes_on(trained, tmp_path, stand_in):
    whole = answer(trained, tmp_path / "whole")
    out = tmp_path / "out"
    for calls in (0, 1, 2):
        stand_in.asked.clear()
        stand_in.calls_left = calls
        with pytest.raises(KeyboardInterrupt):
            answer(trained, out)
    stand_in.calls_left = -1
    path = next((out / "answers").iterdir())
    kept = path.read_bytes()
    path.write_bytes(kept[: len(kept) - 30])  # as kill -9 leaves it
    (out / ".export-killed").mkdir()
    stand_in.asked.clear()
    assert answer(trained, out) == whole and not list(out.glob(".export*"))
    assert len(stand_in.asked) == 240 - (2 * 32 + 28) + 1


def test_other_weights_begin_anew_and_keep_the_old_answers(trained, corpus_file, tmp_path, stand_in):
    runs = shutil.copytree(trained / "micro-seed0", tmp_path / "micro-seed0")
    first = answer(runs, tmp_path / "out").runs[0]
    assert answer(runs, tmp_path / "out", checkpoint=1).runs[0].weights != first.weights
    assert len(stand_in.asked) == 240 and len(list((tmp_path / "out" / "answers").iterdir())) == 2


def test_another_question_needs_another_folder(trained, tmp_path):
    answer(trained, tmp_path / "out")
    with pytest.raises(OutputError, match="with another per_domain, seed"):
        answer(trained, tmp_path / "out", seed=1, questions=21)


def test_only_finished_runs_are_asked(trained, corpus_file, tmp_path):
    runs = shutil.copytree(trained, tmp_path / "runs")
    record = runs / "global-seed0" / "record.jsonl"
    lines = record.read_text().splitlines(keepends=True)
    record.write_text("".join(line for line in lines if '"kind": "end"' not in line))
    done, problems = finished_runs([runs])
    assert [run.header.strategy for run in done] == ["micro"]
    assert problems == ["global-seed0: left out, running at step 2"]
    with pytest.raises(DataError, match="resume"):
        finished_runs([runs / "global-seed0"])


def test_a_run_without_a_checkpoint_is_refused(trained, tmp_path):
    run = shutil.copytree(trained / "micro-seed0", tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(DataError, match="a checkpoint in"):
        answer(run, tmp_path / "out")


def test_no_run_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty"):
        with pytest.raises(DataError, match="run"):
            finished_runs([folder])


def test_runs_that_cannot_be_asked_the_same_are_refused(trained, corpus_file, tmp_path):
    train(settings(corpus_file, "micro", 1, sequence_length=16), tmp_path / "short")
    with pytest.raises(DataError, match="differ in sequence_length"):
        finished_runs([trained, tmp_path / "short"])
    shutil.copytree(trained / "micro-seed0", tmp_path / "again")
    with pytest.raises(ConfigError, match="each strategy once for each seed"):
        finished_runs([trained, tmp_path / "again"])


def test_other_text_than_the_runs_is_refused(trained, tmp_path):
    runs, _ = finished_runs([trained])
    runs = [replace(run, header=replace(run.header, corpus_sha256="0" * 64)) for run in runs]
    with pytest.raises(DataError, match="the text that micro-seed0 was trained on, 000000000000"):
        evaluate(Request(), runs, tmp_path / "out")


def test_a_baseline_is_one_of_the_strategies(trained, tmp_path):
    assert answer(trained, tmp_path / "out", baseline="global").baseline == "global"
    with pytest.raises(ConfigError, match="micro, global"):
        answer(trained, tmp_path / "out", baseline="loss-free")


def test_the_command_prints_tables_and_writes_numbers(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("equipoise.evidence.harness.require_harness", lambda: "0")
    assert main(["downstream", str(trained), "--questions", "20"]) == 0
    said = capsys.readouterr()
    assert "33.3 (22.7..45.9)" in said.out and "global - micro" in said.out
    assert max(map(len, said.out.splitlines()[:-1])) <= 80
    assert "micro, seed 0: 120/120 questions" in said.err
    assert (tmp_path / "downstream" / trained.name / RESULT_NAME).is_file()


def test_without_the_harness_its_extra_is_named(trained, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # also where it is installed
    assert main(["downstream", str(trained)]) == 2
    assert "pip install 'equipoise[downstream]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "said"), [("--checkpoint=first", "--checkpoint last"), ("--batch=0", "--batch of 1")]
)
def test_wrong_options_are_refused_at_once(wrong, said, capsys):
    assert main(["downstream", "nowhere", wrong]) == 2
    assert said in capsys.readouterr().err
