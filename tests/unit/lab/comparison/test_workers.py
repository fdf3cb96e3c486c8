"""The pool of worker processes: pinned, one per slot, their ends read right; real workers that fail early."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest

from equipoise.errors import ConfigError
from equipoise.lab.comparison.workers import PARENT, Job, Pool, cores, last_words, orphaned, slots
from equipoise.lab.config.schema import DataConfig, RunConfig


def jobs(folder, count):
    config = RunConfig(data=DataConfig(data=str(folder / "missing.jsonl")))
    return [Job(f"job{i}", folder / f"job{i}", replace(config, strategy="micro")) for i in range(count)]


def test_workers_run_pinned_one_per_slot_and_their_errors_are_told(tmp_path):
    first, second = jobs(tmp_path, 2)
    core = cores()[-1]
    pool = Pool([first, second], [{core}])
    assert pool.poll() == [first]
    assert (first.status, second.status) == ("running", "waiting")
    assert first.process is not None
    if hasattr(os, "sched_getaffinity"):
        assert os.sched_getaffinity(first.process.pid) == {core}
    while first.status == "running":
        time.sleep(0.05)
        pool.poll()
    assert (first.status, first.exit_code) == ("failed", 4)
    assert first.error.startswith("equipoise: expected ")
    assert "missing.jsonl" in first.error
    assert second.status == "running"
    pool.stop()
    assert second.status in ("interrupted", "failed")
    assert not pool.running


def test_stopping_leaves_no_process_behind(tmp_path):
    pool = Pool(jobs(tmp_path, 2), [set(), set()])
    pool.poll()
    pids = [job.process.pid for job in pool.jobs if job.process]
    pool.stop()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("note\nequipoise: expected a\n  got: b\n  do:  c\n", 2, "equipoise: expected a\n  got: b\n  do:  c"),
        ("Traceback ...\n  line\nValueError: x\n", 1, "ValueError: x"),
        ("", 1, "exit code 1 without a word"),
        ("anything", -signal.SIGKILL, "killed by signal 9 (out of memory?)"),
        ("anything", -signal.SIGSEGV, "killed by signal 11"),
    ],
)
def test_the_last_words_of_a_worker(tmp_path, text, code, words):
    (tmp_path / "log").write_text(text)
    assert last_words(tmp_path / "log", code) == words
    assert last_words(tmp_path / "none", 1) == "exit code 1 without a word"


def test_only_a_worker_without_its_parent_is_an_orphan(monkeypatch):
    monkeypatch.delenv(PARENT, raising=False)
    assert not orphaned()
    monkeypatch.setenv(PARENT, str(os.getppid()))
    assert not orphaned()
    monkeypatch.setenv(PARENT, "1")
    assert orphaned() == (os.getppid() != 1)


def test_fewer_than_no_worker_would_wait_for_ever():
    assert len(slots(1, 1)) == 1 and len(slots(1)) == len(cores())
    with pytest.raises(ConfigError, match="--workers of 1 or more"):
        slots(1, -1)
