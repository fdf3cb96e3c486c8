"""``equipoise downstream`` through the released lm-eval: the lab's own numbers, and nothing is fetched."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equipoise.cli import main
from equipoise.evidence import downstream
from equipoise.evidence.downstream_tasks import METRIC, OTHERS, SAME, TASKS
from equipoise.inspection.loading import open_model
from equipoise.lab.config.schema import DataConfig, ModelConfig, RunConfig, TrainConfig
from equipoise.lab.data.tokenizer import END_ID, load_tokenizer
from equipoise.lab.models.hf_export import export_run
from equipoise.lab.training.trainer import train
from unit.lab.models._given import folder_of, run_of, tiny

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]

STRATEGIES = ("micro", "loss-free")  # exported as Qwen3-MoE and as dots1
QUESTIONS = ["--questions", "12"]


@pytest.fixture(scope="module")
def runs(corpus_file, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    for strategy in STRATEGIES:
        config = RunConfig(
            model=ModelConfig(layers=2, width=32, heads=2, head_dim=16, experts=4, expert_hidden=16, vocab_size=300),
            data=DataConfig(data=str(corpus_file), sequence_length=32),
            train=TrainConfig(
                steps=40,
                micro_batches=4,
                sequences_per_micro_batch=4,
                lr=1e-2,
                warmup=4,
                eval_every=40,
                eval_sequences=4,
                fidelity_every=0,
                tensorboard=False,
                precision="fp32",
            ),
            strategy=strategy,
        )
        train(config, folder / f"{strategy}-seed0")
    return folder


@pytest.fixture(scope="module")
def out(runs, tmp_path_factory) -> Path:
    """What the command writes, with every way to another machine closed."""
    folder = tmp_path_factory.mktemp("out")

    def refuse(self, address):
        raise AssertionError(f"something is fetched: {address}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        assert main(["downstream", str(runs), "--out", str(folder), *QUESTIONS]) == 0
    return folder


def answers(out: Path, strategy: str) -> dict[tuple[str, int], dict]:
    (path,) = (out / "answers").glob(f"{strategy}*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines() if line]
    return {(one["task"], one["question"]): one for one in lines}


def log_probabilities(model, before: list[int], choices: list[list[int]]) -> torch.Tensor:
    """Of each choice after the same tokens, in nats."""
    ids_CS = torch.tensor([before + one for one in choices])
    with torch.no_grad():
        log_probs_CSV = model(ids_CS[:, :-1]).float().log_softmax(-1)
    return log_probs_CSV.gather(-1, ids_CS[:, 1:, None])[:, len(before) - 1 :, 0].sum(-1)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_harness_says_what_the_labs_model_says(runs, out, strategy):
    run = runs / f"{strategy}-seed0"
    model = open_model(run, torch.device("cpu")).model
    tokenizer = load_tokenizer(run / "tokenizer.json")
    said = answers(out, strategy)
    for task in TASKS:
        for at, line in enumerate((out / "tasks" / f"{task}.jsonl").read_text().splitlines()):
            question = json.loads(line)
            prefix = tokenizer.encode(question["prefix"]).ids
            choices = [tokenizer.encode(one).ids for one in question["choices"]]
            after, alone = (log_probabilities(model, before, choices) for before in (prefix, [END_ID]))
            assert said[task, at]["after_prefix"] == pytest.approx(after.tolist(), abs=1e-3)
            assert said[task, at]["alone"] == pytest.approx(alone.tolist(), abs=1e-3)
            assert said[task, at]["correct"] == ((after - alone).argmax().item() == question["answer"])


def test_what_was_trained_tells_domains_apart(out):
    numbers = json.loads((out / "downstream.json").read_text())
    assert numbers["settings"]["lm_eval"] and len(numbers["runs"]) == 2
    for run in numbers["runs"]:
        assert run["tasks"][OTHERS]["low"] > 0.5 and run["tasks"][OTHERS]["n"] == 36


def test_stopped_it_goes_on_to_the_same_numbers(runs, out, tmp_path, monkeypatch):
    monkeypatch.setattr(downstream, "AT_A_TIME", 5)
    calls = []

    def stop(run, done, total):
        calls.append(done)
        if done in (20, 45):
            raise KeyboardInterrupt

    request = downstream.Request(questions=12)
    found, _ = downstream.finished_runs([runs])
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            downstream.evaluate(request, found, tmp_path, on_answers=stop)
    downstream.evaluate(request, found, tmp_path)
    for strategy in STRATEGIES:
        again, whole = answers(tmp_path, strategy), answers(out, strategy)
        assert again.keys() == whole.keys()
        assert all(again[at]["correct"] == whole[at]["correct"] for at in whole)


def test_a_run_that_began_with_a_model_of_transformers(corpus_file, tmp_path, capsys):
    """Its own class, its own tokenizer: one that cuts after 8 tokens unless it is told not to."""
    model = folder_of(tiny("mixtral"), tmp_path / "model", corpus_file)
    train(run_of(model, corpus_file), tmp_path / "run")
    command = ["downstream", str(tmp_path / "run"), "--out", str(tmp_path / "out"), *QUESTIONS]
    assert main(command) == 4  # what this folder says of its marks is nothing that transformers reads
    assert "a tokenizer that lm-eval loads" in capsys.readouterr().err
    marks = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (model / "tokenizer_config.json").write_text(json.dumps(marks))
    assert main(command) == 0
    (run,) = json.loads((tmp_path / "out" / "downstream.json").read_text())["runs"]
    assert [run["tasks"][task]["n"] for task in TASKS] == [36, 36]
    said = answers(tmp_path / "out", "")
    assert all(max(one["after_prefix"]) < -4 for one in said.values())  # nats of four tokens, none of them cut away


def test_the_harness_own_command_gives_the_same_accuracy(runs, out, tmp_path):
    export_run(runs / "micro-seed0", tmp_path / "model")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={tmp_path / 'model'}",
               "--include_path", str(out / "tasks"), "--tasks", ",".join(TASKS), "--device", "cpu",
               "--output_path", str(tmp_path / "said.json")]  # fmt: skip
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("said*.json")
    theirs = json.loads(path.read_text())["results"]
    ours = next(one for one in json.loads((out / "downstream.json").read_text())["runs"] if one["strategy"] == "micro")
    for task in (SAME, OTHERS):
        assert theirs[task][f"{METRIC},none"] == pytest.approx(ours["tasks"][task]["value"])
