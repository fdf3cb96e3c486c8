"""`benchmarks/trainer_speed.py` races equals: both sides say the same first loss, and its table adds up. No times."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(find_spec("transformers") is None, reason="the hf extra is not installed")

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "trainer_speed.py"


def child(*arguments: str) -> list[float]:
    """What a contestant answers to one turn: its first loss, then seconds."""
    command = [sys.executable, str(FILE), "--child", *arguments]
    done = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=240)
    lines = [line for line in done.stdout.splitlines() if re.fullmatch(r"[\d.e-]+", line)]
    assert lines, done.stderr
    return [json.loads(line) for line in lines]


def test_both_sides_train_the_same_model_on_the_same_text():
    loss, seconds, *_ = child("ours", "micro", "fp32", "1")
    their_loss, their_seconds, *_ = child("theirs", "default:32", "fp32", "1")
    assert loss == pytest.approx(their_loss, abs=1e-4)
    assert min(seconds, their_seconds) > 0


def test_the_table_says_where_a_step_goes():
    done = subprocess.run([sys.executable, str(FILE), "--where", "--precision", "fp32"], capture_output=True, text=True,
                          timeout=240)  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = {name: [int(n) for n in found.split()[:4]] for name, found in
            re.findall(r"^(\w+) +((?:\d+ +){3}\d+)", done.stdout, flags=re.M)}  # fmt: skip
    assert {"attention", "experts", "router", "loss", "norms", "optimizer", "rest", "all"} <= rows.keys()
    parts = [row for name, row in rows.items() if name != "all"]
    for column in range(3):
        assert sum(row[column] for row in parts) == pytest.approx(rows["all"][column], abs=len(parts))
    assert rows["rest"][2] < rows["all"][2] / 4  # what has no name is the smaller part
    assert all(rows[name][0] > 0 for name in ("attention", "experts", "loss"))


def test_help_teaches_on_80_columns():
    text = FILE.read_text(encoding="utf-8").split('"""')[1]
    assert max(map(len, text.splitlines()[1:])) <= 80
