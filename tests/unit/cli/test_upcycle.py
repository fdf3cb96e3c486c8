"""`equipoise upcycle` in processes of its own: tables, resume after kill -9, and what the other commands make of it."""

from __future__ import annotations

import json
import signal
import time

import pytest

from equipoise.cli import main
from unit.lab.upcycling._dense import dense_folder


@pytest.fixture(scope="module")
def dense(text, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EQUIPOISE_CACHE", str(tmp_path_factory.getbasetemp() / "cli-cache"))
        return dense_folder(tmp_path_factory.mktemp("dense"), "qwen3", text)


def test_copies_then_inspect_and_compare(dense, text, here, capsys):
    """What a user does: upcycle, look, and train on with two strategies."""
    assert main(["upcycle", str(dense), "moe", "--experts", "4", "--data", str(text), "--length", "32"]) == 0
    said = capsys.readouterr()
    assert "Qwen3MoeForCausalLM, copies" in said.out and "3 of 3 layers with 4 experts, top-2" in said.out
    assert "held-out loss" in said.out and "model: moe" in said.out
    small = ["--length", "32", "--tokens", "256", "--device", "cpu"]
    assert main(["inspect", "moe", "--data", str(text), *small]) == 0
    assert "4 experts" in capsys.readouterr().out
    short = ["--steps", "2", "--set=data.sequence_length=32", "--set=train.micro_batches=2", "--set=train.warmup=1",
             "--set=train.eval_sequences=2", "--set=train.tensorboard=false"]  # fmt: skip
    compared = ["compare", "--model", "moe", "--data", str(text), "--strategies", "micro,global", "--seeds", "1"]
    assert main([*compared, "--out", "cmp", *short]) == 0
    paths = sorted((here / "cmp").glob("*/record.jsonl"))
    records = [json.loads(path.read_text().splitlines()[0]) for path in paths]
    assert [(one["strategy"], one["num_experts"]) for one in records] == [("global", 4), ("micro", 4)]
    told = json.loads((here / "moe" / "upcycle.json").read_text())
    assert {one["active_parameters"] for one in records} == {told["active_parameters"]}


def test_killed_and_gone_on_with(dense, text, here, start, capsys):
    arguments = ["--method", "distill", "--experts", "4", "--granularity", "4", "--data", str(text), "--length", "32",
                 "--tokens", "512", "--passes", "40", "--batch", "4", "--eval-sequences", "2"]  # fmt: skip
    killed = start("upcycle", str(dense), "moe", *arguments)
    deadline = time.monotonic() + 120
    while not (here / "moe" / "model-00002-of-00004.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (here / "moe" / "model-00002-of-00004.safetensors").exists() and killed.poll() is None, "not in the middle"
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert (here / "moe" / "upcycling.json").exists() and not (here / "moe" / "config.json").exists()
    assert main(["upcycle", str(dense), "moe", *arguments, "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert main(["upcycle", str(dense), "whole", *arguments, "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)
    for one in (again, whole):
        del one["seconds"]
        for layer in one["layers"]:
            del layer["seconds"]
    assert again == whole
    assert sorted(path.name for path in (here / "moe").iterdir()) == sorted(
        path.name for path in (here / "whole").iterdir()
    )


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["absent", "moe"], 4, "a Hugging Face folder"),
        (["DENSE", "moe", "--method", "coppy"], 2, "did you mean 'copy'"),
        (["DENSE", "moe", "--method", "split", "--top-k", "3", "--granularity", "2"], 2, "take top_k = 2"),
        (["DENSE", "moe", "--method", "distill", "--strategy", "loss-free"], 2, "a strategy of losses"),
        (["DENSE", "DENSE"], 5, "choose another folder"),
    ],
)
def test_what_is_refused(dense, here, capsys, arguments, code, said):
    assert main(["upcycle", *(str(dense) if one == "DENSE" else one for one in arguments)]) == code
    assert said in capsys.readouterr().err
    assert not (here / "moe").exists()
