"""The examples run as a reader would run them: offline, in a process of their own, on one core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
NEEDS = {
    "plain_loop": (),
    "accelerate_loop": ("accelerate", "transformers"),
    "hf_trainer": ("accelerate", "transformers"),
    "lightning_trainer": ("lightning",),
}


def run(name: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "80"}
    command = [sys.executable, *launcher, str(FOLDER / f"{name}.py"), *arguments]
    done = subprocess.run(command, env=os.environ | offline, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


def maxvio(output: str) -> dict[int, list[float]]:
    """Step -> MaxVio of each layer."""
    lines = re.findall(r"step (\d+): MaxVio (.*)", output)
    return {int(step): [float(value) for value in re.findall(r"layer \d+: (\d+\.\d+)", line)] for step, line in lines}


@pytest.mark.parametrize("name", NEEDS)
def test_an_example_is_short_and_says_what_it_shows(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert text.startswith('"""') and len(text.splitlines()) < 100
    assert f"python examples/{name}.py" in text.partition("from __future__")[0]
    assert "description=__doc__" in text, "--help says it too"


def test_the_plain_loop_balances_what_grows_uneven_without():
    balanced, left_alone = (maxvio(run("plain_loop", "--steps", "25", *more)) for more in ((), ("--coef", "0")))
    assert balanced[1] == left_alone[1], "the first step is the same"
    assert max(balanced[25]) < max(left_alone[25])


def test_accelerate_sees_the_same_load_on_two_processes():
    """Both draw the same rows and share them: the load of the global batch is that of one process."""
    launch = ("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1")
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    alone, two = (maxvio(run("accelerate_loop", "--steps", "3", launcher=by)) for by in ((), launch))
    assert sorted(two) == [1, 3]
    assert alone[1] == two[1]


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_trainer"])
def test_a_trainer_with_the_callback(name):
    seen = maxvio(run(name, "--steps", "3"))
    assert sorted(seen) == [1, 3]
    assert all(len(layers) == 2 and min(layers) > 0 for layers in seen.values())
