"""Following runs: when a page is written again, when it is the last one."""

from __future__ import annotations

import threading
import time

import pytest

from equipoise.report.export import follow as module
from equipoise.report.export.follow import follow, is_running, signature
from equipoise.storage.inspection_record import write_inspection
from equipoise.storage.run_record import read_run
from unit.report.synthetic import header, write_run
from unit.report.synthetic_inspection import synthetic_inspection


def test_an_inspection_that_is_not_finished_is_running(tmp_path):
    run = read_run(write_run(tmp_path / "run", header("micro", 0, steps=20)))
    ended = write_inspection(tmp_path / "all" / "one", synthetic_inspection(experts=4)).parent
    assert not is_running([tmp_path / "run", ended], [run])
    (ended / "other" / "state").mkdir(parents=True)
    assert is_running([tmp_path / "run", ended / "other"], [run]) and is_running([ended], [])
    write_inspection(ended / "other", synthetic_inspection(experts=4))
    assert not is_running([ended], [])


def test_a_run_without_an_end_and_a_comparison_with_runs_to_start_are_running(tmp_path):
    assert is_running([], [read_run(write_run(tmp_path / "a", header("micro", 0, steps=5), until=2, end=""))])
    for status, expected in (("running", True), ("waiting", True), ("finished", False)):
        (tmp_path / "comparison.json").write_text(f'{{"status": "{status}"}}')
        assert is_running([tmp_path], []) == expected
    (tmp_path / "comparison.json").write_text("[")
    assert not is_running([tmp_path], [])


def test_the_signature_changes_with_every_file_that_is_read(tmp_path):
    write_run(tmp_path / "a", header("micro", 0, steps=5), until=2, end="")
    seen = {signature([tmp_path])}
    with open(tmp_path / "a" / "record.jsonl", "a") as file:
        file.write("{}\n")
    seen.add(signature([tmp_path]))
    write_run(tmp_path / "b" / "seed0", header("global", 0, steps=5))
    seen.add(signature([tmp_path]))
    (tmp_path / "notes.txt").write_text("no file of the report")
    seen.add(signature([tmp_path]))
    assert len(seen) == 3


def test_the_page_of_a_run_that_has_ended_is_written_once(tmp_path):
    run = write_run(tmp_path / "run", header("micro", 0, steps=20))
    said = []
    report, page = follow([run], say=said.append)
    assert page == run / "report.html"
    assert page.read_text() == report.html() and 'id="live"' not in page.read_text()
    assert said == []


def test_a_run_is_waited_for_and_followed_to_its_end(tmp_path):
    said = []
    run = tmp_path / "run"
    run.mkdir()
    found = []
    page = tmp_path / "x.html"
    thread = threading.Thread(target=lambda: found.append(follow([run], page, every=0.05, say=said.append)))
    thread.start()
    for steps, end in ((5, ""), (10, "finished")):
        until = time.monotonic() + 60
        while len(said) < (1 if steps == 5 else 2) and time.monotonic() < until:
            time.sleep(0.01)
        (run / "record.jsonl").unlink(missing_ok=True)
        write_run(tmp_path / f"whole{steps}", header("micro", 0, steps=10), until=steps, end=end)
        (tmp_path / f"whole{steps}" / "record.jsonl").rename(run / "record.jsonl")
    thread.join(60)
    assert said[0].startswith("waiting: expected")
    assert said[1] == f"{page}: 1 running, step 5"
    assert found[0][0].runs[0].status == "finished"


def test_ctrl_c_leaves_a_page_that_does_not_refresh(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", header("micro", 0, steps=20), until=10, end="")
    pages = []

    def interrupt(seconds):
        pages.append((run / "report.html").read_text())
        raise KeyboardInterrupt

    monkeypatch.setattr(module.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        follow([run], say=lambda line: None)
    assert 'id="live"' in pages[0] and 'id="live"' not in (run / "report.html").read_text()
