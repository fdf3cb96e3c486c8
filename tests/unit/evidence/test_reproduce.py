"""Claims trained for real, tiny: what is missing, kept, stopped by kill -9, gone on with, and rendered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from equipoise.cli import main
from equipoise.evidence.reproduce import missing_runs
from equipoise.evidence.run_summary import read_summaries, write_summaries
from unit.evidence._made import CLAIM, claim_in, runs_of

BASE = """\
[model]
layers = 1
width = 16
heads = 1
head_dim = 16
experts = 4
expert_hidden = 16
vocab_size = 300

[data]
data = "{corpus}"
sequence_length = 32

[train]
steps = {steps}
micro_batches = 4
warmup = 2
precision = "fp32"
eval_every = 0
eval_sequences = 4
fidelity_every = 0
checkpoint_every = 5
tensorboard = false
"""


def folders(tmp_path: Path, corpus_file: Path, *, steps=6, seeds=2) -> list[str]:
    """A claim of two strategies and the arguments that keep everything under ``tmp_path``."""
    base = BASE.format(corpus=corpus_file, steps=steps)
    claim_in(tmp_path / "evidence", seeds=seeds, criterion="lower", base=base)
    return ["--evidence", str(tmp_path / "evidence"), "--runs", str(tmp_path / "runs"),
            "--page", str(tmp_path / "page.md"), "--workers", "2"]  # fmt: skip


def test_a_claim_from_nothing_to_the_page(tmp_path, corpus_file, capsys):
    where = folders(tmp_path, corpus_file)
    for nothing in ([], ["list"], ["list", "T1"], ["list", "--all"]):
        assert main(["reproduce", *nothing, *where]) == 0
        said = capsys.readouterr()
        assert "not run" in said.out and "to train" not in said.err
    assert main(["reproduce", "--all", *where]) == 0
    said = capsys.readouterr()
    assert "4 runs to train" in said.err and "global - micro" in said.out
    runs = read_summaries(tmp_path / "evidence" / "records")
    assert sorted((run.strategy, run.seed) for run in runs) == [(s, n) for s in ("global", "micro") for n in (0, 1)]
    assert all(run.status == "finished" and run.tokens == 6 * 4 * 32 and len(run.loss) > 1 for run in runs)
    assert not list((tmp_path / "runs").glob("*-seed*"))  # what is on record leaves nothing behind
    page = (tmp_path / "page.md").read_bytes()
    assert b"Wide below narrow" in page and b"2/2 pairs" in page

    assert main(["reproduce", "--all", *where]) == 0
    assert "0 runs to train" in capsys.readouterr().err
    assert (tmp_path / "page.md").read_bytes() == page
    (tmp_path / "page.md").unlink()
    assert main(["reproduce", "--all", "--from-records", *where]) == 0
    assert (tmp_path / "page.md").read_bytes() == page


def test_again_elsewhere_says_whether_it_is_the_same(tmp_path, corpus_file, capsys):
    where = folders(tmp_path, corpus_file)
    assert main(["reproduce", "T1", *where]) == 0
    assert main(["reproduce", "T1", *where, "--records", str(tmp_path / "mine"), "--again"]) == 0
    assert "inside" in capsys.readouterr().out
    mine, theirs = read_summaries(tmp_path / "mine"), read_summaries(tmp_path / "evidence" / "records")
    assert [run.loss for run in mine] == [run.loss for run in theirs]  # one machine: equal to the last bit


def test_killed_and_gone_on_with(tmp_path, corpus_file, capsys):
    whole = folders(tmp_path / "whole", corpus_file, steps=60, seeds=1)
    assert main(["reproduce", "T1", *whole]) == 0
    where = folders(tmp_path / "killed", corpus_file, steps=60, seeds=1)
    command = [sys.executable, "-m", "equipoise", "reproduce", "T1", *where]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, start_new_session=True, **quiet)
    runs = tmp_path / "killed" / "runs"
    deadline = time.monotonic() + 120
    while not list(runs.glob("*/checkpoints/step_*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while _workers(runs) and time.monotonic() < deadline:  # they see that their parent is gone, save and end
        time.sleep(0.1)
    capsys.readouterr()
    assert main(["reproduce", "T1", *where]) == 0
    records = [read_summaries(tmp_path / name / "evidence" / "records") for name in ("whole", "killed")]
    assert [run.loss for run in records[0]] == [run.loss for run in records[1]]


def test_a_run_that_was_recorded_before_a_measure_is_trained_again(tmp_path, monkeypatch):
    claims = [claim_in(tmp_path / name, seeds=2, more=more) for name, more in
              (("plain", ""), ("rare", 'measure = "loss_rare"'))]  # fmt: skip
    text = SimpleNamespace(corpus_sha256="c0ffee" + 58 * "0")
    monkeypatch.setattr("equipoise.evidence.reproduce.prepare_text", lambda *_: text)
    runs = [replace(run, corpus=text.corpus_sha256[:12]) for run in runs_of(claims[0], [0.1, 0.2])]
    write_summaries(tmp_path / "records", runs)
    assert missing_runs(claims[:1], tmp_path / "records", print) == []
    assert len(missing_runs(claims[1:], tmp_path / "records", print)) == 4
    assert len(missing_runs(claims, tmp_path / "records", print)) == 4
    tenths = {"input": [1.0] * 10, "target": [1.0] * 10}
    write_summaries(tmp_path / "records", [replace(run, loss_by_frequency=tenths) for run in runs[1:]])
    assert [(one.strategy, one.train.seed) for one in missing_runs(claims, tmp_path / "records", print)] == [
        (runs[0].strategy, runs[0].seed)
    ]


def test_two_at_once(tmp_path, corpus_file, capsys):
    where = folders(tmp_path, corpus_file)
    from equipoise.storage.locks import locked

    with locked(tmp_path / "runs"):
        assert main(["reproduce", "T1", *where]) == 5
    assert "another process" in capsys.readouterr().err


def test_a_run_that_diverges_is_a_result_and_one_that_fails_is_not(tmp_path, corpus_file, capsys):
    where = folders(tmp_path, corpus_file, seeds=1)
    text = CLAIM.format(criterion="lower", seeds=1, family="secondary", more='settings = { "train.lr" = 1e30 }')
    (tmp_path / "evidence" / "T1-wide.toml").write_text(text)
    assert main(["reproduce", "T1", *where]) == 0
    assert {run.status for run in read_summaries(tmp_path / "evidence" / "records")} == {"diverged"}
    assert "not run" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["T2"], 2, "claim"),
        (["T1", "--evidence", "nowhere"], 4, "inside a clone"),
        (["T1", "--again"], 2, "--records mine"),
        (["T1", "--ray-address", "head:6379"], 2, "add --on ray"),
    ],
)
def test_what_is_refused(tmp_path, corpus_file, capsys, arguments, code, said):
    assert main(["reproduce", *folders(tmp_path, corpus_file), *arguments]) == code
    assert said in capsys.readouterr().err


def test_on_ray_without_ray(tmp_path, corpus_file, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["reproduce", "T1", *folders(tmp_path, corpus_file), "--on", "ray"]) == 2
    assert "pip install 'equipoise[ray]'" in capsys.readouterr().err


def _workers(runs: Path) -> list[int]:
    """Processes that train into this folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(runs).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found
