"""The examples run as a reader would run them: offline, in a process of their own, on one core."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from integrations.examples._fresh import QUIET
from integrations.examples._fresh import run as fresh

FOLDER = Path(__file__).resolve().parents[3] / "examples"
EXTRAS = {"accelerate": "hf", "transformers": "hf", "lightning": "lightning", "sklearn": "images"}
NEEDS = {
    "plain_loop": (),
    "unlike_experts": (),
    "accelerate_loop": ("accelerate", "transformers"),
    "hf_trainer": ("accelerate", "transformers"),
    "lightning_trainer": ("lightning",),
    "expert_choice": ("sklearn",),
    "masked_words": ("transformers",),
    "modality_experts": ("sklearn",),
}


def run(name: str, *arguments: str, size: int = 1) -> str:
    for package in NEEDS[name]:
        if find_spec(package) is None:
            pytest.skip(f"{name}.py is for users of the {EXTRAS[package]} extra, which is not installed")
    return fresh(FOLDER / f"{name}.py", *arguments, size=size)[0]


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


@pytest.mark.parametrize("more", [(), ("--top-p", "0.6")], ids=["top-2", "top-p"])
def test_the_penalty_gives_narrow_experts_more(more):
    said = run("unlike_experts", "--steps", "40", *more)
    plain, penalty = (float(width) for width in re.findall(r"active width (\d+)", said))
    assert penalty < plain
    loads = [[float(load) for load in line.split()] for line in re.findall(r"load  (.*)", said)]
    assert sum(loads[1][:4]) > sum(loads[0][:4])
    assert ("experts a token" in said) == bool(more)


def test_accelerate_sees_the_same_load_on_two_processes():
    """Both draw the same rows and share them: the load of the global batch is that of one process."""
    alone, two = (maxvio(run("accelerate_loop", "--steps", "3", size=size)) for size in (1, 2))
    assert sorted(two) == [1, 3]
    assert alone[1] == two[1]


@pytest.mark.parametrize("name", ["hf_trainer", "lightning_trainer"])
def test_a_trainer_with_the_callback(name):
    seen = maxvio(run(name, "--steps", "3"))
    assert sorted(seen) == [1, 3]
    assert all(len(layers) == 2 and min(layers) > 0 for layers in seen.values())


def test_experts_that_choose_from_an_image_give_every_noise_level_the_same():
    """From the whole batch they need not: there thresholds decide, level by level."""
    said = {scope: run("expert_choice", "--steps", "3", "--scope", scope) for scope in ("sample", "global_batch")}
    experts = {scope: re.findall(r"layer \d: (\d\.\d\d)", text) for scope, text in said.items()}
    assert experts["sample"] == ["1.00"] * 6
    assert len(experts["global_batch"]) == 6 and len(set(experts["global_batch"])) > 1


def test_auxiliary_routers_stand_in_for_experts_that_choose_by_modality():
    said = run("modality_experts", "--steps", "3")
    losses = {way: (text, image) for way, text, image in re.findall(r"(\w+): (\d\.\d+) text, (\d\.\d+) image", said)}
    assert losses.keys() == {"causal", "chosen"} and losses["causal"] != losses["chosen"]
    right = int(re.findall(r"auxiliary routers: (\d+)% right", said)[0])
    assert 50 < right < 100


def test_masked_words_go_three_ways_and_are_generated():
    said = run("masked_words", "--steps", "2")
    ways = re.findall(r"(\w+): held-out loss after frequent words (\d\.\d+), others \d\.\d+, rare ones (\d\.\d+)", said)
    assert [way for way, _, _ in ways] == ["free", "masked", "masked"]
    assert len({loss for _, *both in ways for loss in both}) > 3, "the masks make a difference"
    assert "written with a cache: " in said


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "launcher"),
    [
        (
            "accelerate_loop",
            ("accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"),
        ),
        ("hf_trainer", ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")),
    ],
)
def test_the_launcher_that_an_example_names(name, launcher):
    command = [sys.executable, "-m", *launcher, str(FOLDER / f"{name}.py"), "--steps", "3"]
    done = subprocess.run(command, env=os.environ | QUIET, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(maxvio(done.stdout)) == [1, 3]
