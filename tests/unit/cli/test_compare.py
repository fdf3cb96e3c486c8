"""`equipoise compare` with real worker processes: paired, continued, extended, and honest about what failed."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from equipoise.cli import main
from equipoise.storage.locks import locked
from equipoise.storage.run_record import read_run


def status(folder: Path) -> dict[str, str]:
    return {run["folder"]: run["status"] for run in json.loads((folder / "comparison.json").read_text())["runs"]}


def children(process_id: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process_id}/task/{process_id}/children").read_text().split()]


def is_worker(process_id: int) -> bool:
    """Whether the process is alive and (still) a worker of ours."""
    try:
        return b"--plain" in Path(f"/proc/{process_id}/cmdline").read_bytes()
    except OSError:
        return False


def wait_until(happened, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.05)


def steps_of(folder: Path) -> int:
    record = folder / "record.jsonl"
    return record.read_text().count('"kind": "step"') if record.exists() else 0


def test_strategies_are_paired_reported_and_extended(tiny, here, capsys):
    assert main(["compare", "--strategies", "micro,none", "--out", "all", "--seeds", "1", *tiny]) == 0
    shown = capsys.readouterr()
    assert "micro" in shown.out
    assert "report: all" in shown.out
    assert (here / "all" / "report.html").read_text().lower().startswith("<!doctype html")
    runs = [read_run(here / "all" / name) for name in ("micro-seed0", "none-seed0")]
    # the same weights and the same first batch: the first loss agrees to the last bit, the gradients do not
    assert runs[0].steps[0].loss == runs[1].steps[0].loss
    assert runs[0].steps[-1].loss != runs[1].steps[-1].loss
    assert [run.status for run in runs] == ["finished", "finished"]

    before = (here / "all" / "micro-seed0" / "record.jsonl").read_bytes()
    assert main(["compare", "--strategies", "global", "--out", "all", "--seeds", "1", *tiny]) == 0
    assert status(here / "all") == dict.fromkeys(["micro-seed0", "none-seed0", "global-seed0"], "finished")
    assert (here / "all" / "micro-seed0" / "record.jsonl").read_bytes() == before

    assert main(["compare", "--strategies", "global", "--out", "all", "--seeds", "1", *tiny, "--lr", "0.5"]) == 5
    assert "train.lr" in capsys.readouterr().err
    assert status(here / "all")["micro-seed0"] == "finished"


def test_a_failing_run_is_shown_and_the_others_go_on(tiny, here, capsys):
    (here / "own.toml").write_text(
        '[[strategy]]\nname = "wild"\npolicies = [{ kind = "AuxLoss", scope = "micro_batch", coef = 1e30 }]\n'
    )
    assert main(["compare", "own.toml", "--strategies", "wild,none", "--out", "some", "--seeds", "1", *tiny]) == 1
    shown = capsys.readouterr()
    assert "finite loss and gradient" in shown.err
    assert status(here / "some") == {"wild-seed0": "failed", "none-seed0": "finished"}
    assert (here / "some" / "report.html").exists()
    assert "wild" in shown.out


def test_a_stopped_comparison_is_saved_and_the_same_command_goes_on(tiny, here, start):
    command = [
        "compare",
        "--strategies",
        "micro,none",
        "--seeds",
        "1",
        *tiny,
        "--steps",
        "30",
        "--set=train.checkpoint_every=0",
    ]
    process = start(*command)
    wait_until(lambda: any(steps_of(folder) >= 2 for folder in here.glob("runs/*/micro-seed0")), "two steps")
    workers = children(process.pid)
    process.terminate()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    (folder,) = (here / "runs").iterdir()
    assert f"--resume runs/{folder.name}" in said
    assert f"equipoise report runs/{folder.name}" in said
    assert not any(is_worker(worker) for worker in workers)
    assert "running" not in status(folder).values()
    assert main(command) == 0
    assert list((here / "runs").iterdir()) == [folder]
    for name in ("micro-seed0", "none-seed0"):
        assert [step.step for step in read_run(folder / name).steps] == list(range(1, 31))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc, which only Linux has")
def test_workers_do_not_outlive_a_killed_parent(tiny, here, start):
    process = start(
        "compare",
        "--strategies",
        "micro",
        "--out",
        "one",
        "--seeds",
        "1",
        *tiny,
        "--steps",
        "100000",
        "--set=train.eval_every=0",
    )
    wait_until(lambda: steps_of(here / "one" / "micro-seed0") >= 2, "two steps")
    workers = [child for child in children(process.pid) if is_worker(child)]
    assert workers
    os.kill(process.pid, signal.SIGKILL)
    wait_until(lambda: not any(is_worker(worker) for worker in workers), "the workers' end")
    assert read_run(here / "one" / "micro-seed0").status == "interrupted"


def test_two_comparisons_do_not_share_a_folder(tiny, here, capsys):
    with locked(here / "all"):
        assert main(["compare", "--strategies", "micro", "--out", "all", "--seeds", "1", *tiny]) == 5
    assert "another process" in capsys.readouterr().err


def test_what_cannot_begin_overwrites_nothing(tiny, here, capsys):
    assert main(["compare", "--strategies", "micro", "--out", "all", "--seeds", "1", *tiny]) == 0
    before = {path: path.read_bytes() for path in (here / "all").rglob("*") if path.is_file()}
    (here / "broken.jsonl").write_text('{"text": "abc"')
    wrong = ["--out", "all", "--overwrite", *tiny, "--data", "broken.jsonl"]
    assert main(["compare", "--strategies", "micro", "--seeds", "1", *wrong]) == 4
    assert {path: path.read_bytes() for path in (here / "all").rglob("*") if path.is_file()} == before


def test_a_configuration_of_train_says_what_is_another_setting_here(here, capsys):
    (here / "run.toml").write_text('strategy = "global"\n')
    assert main(["compare", "run.toml"]) == 2
    assert "a setting of `equipoise train`" in capsys.readouterr().err


def test_a_folder_with_something_else_is_never_touched(tiny, here, capsys):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.txt").write_text("years")
    for more in ([], ["--overwrite"]):
        assert main(["compare", "--strategies", "micro", "--out", "mine", *more, *tiny]) == 5
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in (here / "mine").iterdir()] == ["thesis.txt"]
