"""What is shown while runs go: a table on a terminal, lines elsewhere, and nothing that a name could break."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from equipoise.lab.comparison.progress import Preparation, RunBar, RunTable
from equipoise.lab.comparison.record_tail import MAXVIO
from equipoise.lab.comparison.workers import Job
from equipoise.lab.config.schema import RunConfig, TrainConfig
from equipoise.storage.run_record import RecordWriter, Step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def console(terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)


def text(shown: Console) -> str:
    assert isinstance(shown.file, io.StringIO)
    return shown.file.getvalue()


def step(number: int) -> Step:
    return Step(number, 3.25, 1e-3, 1.0, 4000, 0.5, {MAXVIO: 0.75})


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job("glob[red]al-seed0", tmp_path / "run", RunConfig(train=TrainConfig(steps=10)))


def written(job: Job, *numbers: int) -> None:
    job.folder.mkdir(exist_ok=True)
    with RecordWriter(job.folder) as writer:
        for number in numbers:
            writer.write(step(number))
    job.tail.read()


def test_a_table_shows_each_run_in_80_columns(job):
    shown = console(terminal=True)
    written(job, 1, 2)
    job.status = "running"
    with RunTable([job], shown) as table:
        table.update([job])
    lines = text(shown).splitlines()
    assert any(all(part in line for part in ("glob[red]al-seed0", "2/10", "3.250", "0.75", "8,000")) for line in lines)
    assert any("0 of 1 runs" in line for line in lines)


def test_of_more_runs_than_lines_those_at_work_stay_in_sight(tmp_path):
    shown = console(terminal=True)
    shown.height = 12
    jobs = [Job(f"run{n:02}", tmp_path / f"{n}", RunConfig(train=TrainConfig(steps=10))) for n in range(30)]
    for job in jobs[:12]:
        job.status = "finished"
    jobs[12].status = jobs[13].status = "running"
    table = RunTable(jobs, shown)
    names = [job.name for job in table._in_sight()]
    assert len(names) <= 8
    assert {"run12", "run13"} <= set(names)
    jobs[20].status, jobs[20].error = "failed", "no"
    assert "run20" in [job.name for job in table._in_sight()]
    with table:
        table.update([])
        assert "run29" not in text(shown)
    assert "run29" in text(shown)  # at the end all of them


def test_without_a_terminal_lines_come_when_something_changes_and_now_and_then(job):
    shown, clock = console(terminal=False), Clock()
    job.status = "running"
    with RunTable([job], shown, clock) as table:
        table.update([job])
        written(job, 1, 2, 3)
        table.update([])
        assert text(shown).splitlines() == ["glob[red]al-seed0: running, no step yet"]
        clock.now = 100.0
        table.update([])
        clock.now = 101.0
        table.update([])
        job.status = "finished"
        table.update([job])
    lines = text(shown).splitlines()
    assert lines[1].startswith("glob[red]al-seed0: running, step 3/10, loss 3.250, MaxVio 0.75, 8,000 tokens/s")
    assert lines[2].startswith("glob[red]al-seed0: finished")
    assert len(lines) == 3


def test_on_a_cluster_the_node_is_named_and_a_lost_run_waits_again(job):
    plain, shown = console(terminal=False), console(terminal=True)
    job.status, job.node = "running", "10.0.0.7"
    RunTable([job], plain).update([job])
    with RunTable([job], shown) as table:
        table.update([job])
    job.status, job.node, job.error = "waiting", "", "lost with 10.0.0.7 (it died)"
    RunTable([job], plain).update([job])
    assert text(plain).splitlines() == [
        "glob[red]al-seed0: running on 10.0.0.7, no step yet",
        "glob[red]al-seed0: waiting again, lost with 10.0.0.7 (it died)",
    ]
    assert any("node" in line and "step" in line for line in text(shown).splitlines()) and "10.0.0.7" in text(shown)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_is_shown_with_its_error(job, terminal):
    shown = console(terminal)
    job.status, job.error = "failed", "equipoise: expected [bold]x\n  got: y\n  do:  z"
    with RunTable([job], shown) as table:
        table.update([job])
    assert "expected [bold]x" in text(shown)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_shows_the_run(terminal):
    shown, clock = console(terminal), Clock()
    with RunBar(10, shown, clock) as bar:
        for number in range(1, 11):
            clock.now += 10
            bar(step(number))
    assert "10/10  loss 3.250  MaxVio 0.75  8,000 tokens/s" in text(shown)
    if not terminal:
        seen = [line.partition("/")[0] for line in text(shown).splitlines()]
        assert seen == ["step 1", "step 5", "step 9", "step 10"]  # one in more than 30 seconds, and the last
        assert "0:50 left" in text(shown)


def test_preparation_says_each_thing_once():
    shown = console(terminal=False)
    with Preparation(shown) as said:
        for share in (0.0, 0.5, 1.0):
            said("reading [a]", share)
        said("packing", 0.0)
    assert text(shown).splitlines() == ["reading [a]", "packing"]
