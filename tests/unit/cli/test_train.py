"""`equipoise train` and `resume`: one run on disk, never overwritten by accident, stopped and gone on with."""

from __future__ import annotations

import json
import signal
import time

from equipoise.cli import main
from equipoise.lab.training.launch import LEAVING_SECONDS
from equipoise.storage.locks import locked
from equipoise.storage.run_record import read_run


def wait_for_steps(record, count: int, process) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if record.exists() and record.read_text().count('"kind": "step"') >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} steps: {process.communicate()[1] if process.poll() is not None else 'too slow'}")


def test_a_run_is_kept_until_told_otherwise(tiny, here, capsys):
    assert main(["train", "--strategy", "global", "--out", "run", *tiny]) == 0
    assert capsys.readouterr().out.strip() == "run"
    run = read_run(here / "run")
    assert (run.status, len(run.steps), run.header.strategy) == ("finished", 8, "global")
    first = (here / "run" / "record.jsonl").read_bytes()

    assert main(["train", "--strategy", "micro", "--out", "run", *tiny]) == 5
    assert main(["train", "--strategy", "micro", "--out", "run", "--continue", *tiny]) == 2  # not the same run
    assert main(["resume", "run"]) == 0  # nothing left to do
    assert (here / "run" / "record.jsonl").read_bytes() == first

    (here / "run" / "notes.txt").write_text("mine")
    assert main(["train", "--strategy", "micro", "--out", "run", "--overwrite", *tiny]) == 0
    assert read_run(here / "run").header.strategy == "micro"
    assert (here / "run" / "notes.txt").read_text() == "mine"


def test_what_cannot_begin_overwrites_nothing(tiny, here, capsys):
    assert main(["train", "--strategy", "global", "--out", "run", *tiny]) == 0
    before = {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()}
    (here / "broken.jsonl").write_text('{"text": "abc"')
    for plain in ([], ["--plain"]):
        wrong = ["train", "--out", "run", "--overwrite", *tiny, *plain, "--data", "broken.jsonl"]
        assert main(wrong) == 4
    assert {path: path.read_bytes() for path in (here / "run").rglob("*") if path.is_file()} == before
    assert main(["resume", "run"]) == 0


def test_a_run_under_way_is_not_waited_for_by_another(tiny, here, capsys):
    """``--plain`` changes what is shown, and nothing else."""
    with locked(here / "run"):
        began = time.monotonic()
        assert main(["train", "--out", "run", "--plain", "--overwrite", *tiny]) == 5
    assert "another process" in capsys.readouterr().err
    assert time.monotonic() - began < LEAVING_SECONDS, "it was waited for as a worker is"


def test_a_loss_that_diverges_is_a_run_that_failed(tiny, here, capsys):
    assert main(["train", "--out", "run", "--plain", *tiny, "--lr", "1e9"]) == 1
    assert "a finite loss and gradient" in capsys.readouterr().err
    assert read_run(here / "run").status == "failed"


def test_a_run_that_was_killed_is_not_running(tiny, here):
    assert main(["train", "--out", "run", "--plain", *tiny]) == 0
    record = here / "run" / "record.jsonl"
    record.write_bytes(b"".join(record.read_bytes().splitlines(keepends=True)[:-1]))
    assert read_run(here / "run").status == "interrupted"
    with locked(here / "run"):
        assert read_run(here / "run").status == "running"


def test_a_stopped_run_is_saved_and_goes_on_to_its_end(tiny, here, start):
    process = start(
        "train",
        "--out",
        "run",
        *tiny,
        "--steps",
        "3000",
        "--set",
        "train.eval_every=0",
        "--set=train.checkpoint_every=0",
    )
    wait_for_steps(here / "run" / "record.jsonl", 3, process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "equipoise resume run" in said
    run = read_run(here / "run")
    assert run.status == "interrupted"
    assert 3 <= len(run.steps) < 3000

    other = start("resume", "run")
    wait_for_steps(here / "run" / "record.jsonl", len(run.steps) + 2, other)
    other.send_signal(signal.SIGTERM)
    other.communicate(timeout=120)
    longer = [step.step for step in read_run(here / "run").steps]
    assert longer == list(range(1, len(longer) + 1))
    assert len(longer) > len(run.steps)


def test_a_folder_that_another_process_works_in_is_left_alone(tiny, here, capsys):
    with locked(here / "run"):
        assert main(["train", "--out", "run", *tiny]) == 5
    assert "another process" in capsys.readouterr().err
    assert not (here / "run" / "record.jsonl").exists()


def test_a_place_that_cannot_be_a_folder_is_refused(tiny, here, capsys):
    (here / "file").write_text("mine")
    assert main(["train", "--out", "file/run", *tiny]) == 5
    assert "expected to write file/run" in capsys.readouterr().err
    assert (here / "file").read_text() == "mine"


def test_the_record_holds_all_settings(tiny, here):
    assert main(["train", "--strategy", "loss-free", "--out", "run", *tiny, "--seed", "5"]) == 0
    header = json.loads((here / "run" / "record.jsonl").read_text().splitlines()[0])
    assert header["config"]["train"]["seed"] == 5
    assert header["config"]["strategy"] == "loss-free"
    assert header["config"]["model"]["experts"] == 4
