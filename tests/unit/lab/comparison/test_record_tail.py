"""Following a record that is being written: half lines, replaced files, and the speed that is shown."""

from __future__ import annotations

import json
import os

import pytest

from equipoise.lab.comparison.record_tail import MAXVIO, RecordTail, duration
from equipoise.storage.run_record import RecordWriter, Step


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def step(number: int, seconds: float = 0.5) -> Step:
    return Step(number, 5.0 - number / 100, 1e-3, 1.0, 1000, seconds, {MAXVIO: number / 10})


def test_what_the_writer_wrote_is_seen_once(tmp_path):
    tail = RecordTail(tmp_path / "record.jsonl")
    assert tail.read() == 0
    with RecordWriter(tmp_path) as writer:
        for number in (1, 2):
            writer.write(step(number))
        assert tail.read() == 2
        assert tail.read() == 0
        writer.write(step(3))
    assert tail.read() == 1
    assert (tail.step, tail.loss, tail.maxvio) == (3, 4.97, 0.3)
    assert tail.tokens_per_second == 2000


def test_half_a_line_waits_for_its_end(tmp_path):
    path = tmp_path / "record.jsonl"
    line = json.dumps({"kind": "step", "step": 1, "loss": 2.0, "tokens": 10, "seconds": 1.0})
    path.write_text(line[:20])
    tail = RecordTail(path)
    assert tail.read() == 0
    path.write_text(line + "\n")
    os.truncate(path, len(line) + 1)
    assert tail.read() == 1


def test_lines_that_are_no_steps_are_passed_over(tmp_path):
    path = tmp_path / "record.jsonl"
    path.write_text('{"kind": "load", "step": 9, "counts": []}\n"step"\n[]\n{"step": 3}\n\xff{"kind": "step"}\n')
    tail = RecordTail(path)
    assert tail.read() == 0
    assert tail.step == 0


def test_a_loss_that_is_no_number_leaves_a_gap(tmp_path):
    with RecordWriter(tmp_path) as writer:
        writer.write(Step(1, float("nan"), 0.1, 1.0, 10, 1.0))
    tail = RecordTail(tmp_path / "record.jsonl")
    tail.read()
    assert (tail.step, tail.loss) == (1, None)


def test_a_resumed_run_is_read_again_from_its_start(tmp_path):
    tail = RecordTail(tmp_path / "record.jsonl")
    with RecordWriter(tmp_path) as writer:
        for number in range(1, 6):
            writer.write(step(number))
    tail.read()
    with RecordWriter(tmp_path, keep_until=2) as writer:
        assert tail.read() == 2
        assert tail.step == 2
        writer.write(step(3))
    tail.read()
    assert tail.step == 3


def test_time_left_follows_the_wall_clock_of_this_part(tmp_path):
    clock = Clock()
    tail = RecordTail(tmp_path / "record.jsonl", clock)
    with RecordWriter(tmp_path) as writer:
        writer.write(step(50))  # was there before
        tail.read()
        assert tail.seconds_left(100) is None
        clock.now = 20.0
        writer.write(step(60))
        tail.read()
    assert tail.seconds_left(100) == pytest.approx(80.0)
    assert tail.seconds_left(60) == 0


def test_durations():
    assert [duration(s) for s in (0, 59.6, 61, 3599, 3661)] == ["0:00", "1:00", "1:01", "59:59", "1:01:01"]
