"""A text of three domains and the arguments of runs that take seconds, for commands in real processes."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

WORDS = {"low": "a b c d e f g h", "digits": "0 1 2 3 4 5 6 7 8 9", "signs": "+ - * / = ( ) [ ] ;"}
SETTINGS = {
    "model.layers": 1, "model.width": 16, "model.heads": 2, "model.head_dim": 8, "model.experts": 4,
    "model.expert_hidden": 16, "model.vocab_size": 300, "data.sequence_length": 32, "train.warmup": 2,
    "train.eval_every": 4, "train.eval_sequences": 4, "train.checkpoint_every": 4, "train.tensorboard": "false",
    "train.micro_batches": 2, "train.sequences_per_micro_batch": 2, "train.fidelity_every": 4,
}  # fmt: skip


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        for number in range(80):
            for domain, words in WORDS.items():
                words = " ".join(rng.choices(words.split(), k=150))
                file.write(json.dumps({"text": f"{words} {number}", "domain": domain}) + "\n")
    return path


@pytest.fixture(scope="session")
def tiny(text):
    """Arguments after `train` or `compare` that make a run tiny."""
    return ["--data", str(text), "--steps", "8", *(f"--set={name}={value}" for name, value in SETTINGS.items())]


@pytest.fixture(autouse=True)
def here(tmp_path, tmp_path_factory, monkeypatch):
    """An empty working folder, and a cache that is not the user's but shared by these tests."""
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def start(here):
    """Starts `python -m equipoise ...` as a process of its own; what is still alive at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "equipoise", *arguments],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=here,
        )  # fmt: skip
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()
