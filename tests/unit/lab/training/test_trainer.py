"""Runs as a user makes them: real text, real files, real processes that are killed, stopped and starved of disk."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import sys
import time
import warnings

import pytest
import torch

from equipoise.errors import ConfigError, DataError, OutputError, StateError
from equipoise.lab.config.schema import TrainConfig
from equipoise.lab.training.trainer import CHECKPOINTS, learning_rate, train
from equipoise.policies import ESTIMATORS
from equipoise.storage import checkpoint
from equipoise.storage.run_record import RECORD_NAME, read_run
from unit.lab.training import victim


def numbers(folder) -> list[dict]:
    """All lines of a record that are results, without wall time."""
    lines = [json.loads(line) for line in (folder / RECORD_NAME).read_text().splitlines()]
    kept = [line for line in lines if line["kind"] not in ("header", "end")]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in kept]


def weights(folder) -> dict:
    return checkpoint.load_latest(folder / CHECKPOINTS)[1]


def assert_same(a, b, path="") -> None:
    """Equal to the last bit, tensors and numbers."""
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    elif not path.endswith("seconds"):
        assert a == b, path


def test_a_run_leaves_a_complete_record(tiny_run, tmp_path):
    config = tiny_run("global:prefix@0.02+micro@1e-4")
    seen = []
    folder = train(config, tmp_path / "run", on_step=seen.append)
    run = read_run(folder)
    assert run.status == "finished" and not run.problems
    assert run.header.config == json.loads(json.dumps(dataclasses.asdict(config)))
    assert run.header.domains == ["code", "numbers", "prose"]
    assert run.header.parameters > run.header.active_parameters > 0
    assert [step.step for step in run.steps] == [1, 2, 3, 4, 5, 6]
    assert seen == run.steps
    assert all(step.tokens == 4 * 2 * 32 for step in run.steps)
    assert run.end.tokens == 6 * 256 and run.end.peak_memory_bytes > 50e6
    assert run.end.seconds == pytest.approx(sum(step.seconds for step in run.steps))
    assert run.steps[0].balance["balance/micro/loss"] > 1.0
    assert [load.step for load in run.loads] == [2, 4, 6]
    for load in run.loads:  # every choice of every token, in every layer
        assert [sum(layer) for layer in load.counts] == [256 * 2] * 2
    assert [found.step for found in run.fidelities] == [2, 4, 6]
    assert set(run.fidelities[0].relative_error) == set(run.fidelities[0].cosine) == set(ESTIMATORS) - {"exact"}
    assert run.fidelities[0].in_use == ["prefix"]
    assert [evaluation.step for evaluation in run.evaluations] == [3, 6]
    assert run.evaluations[-1].perplexity < run.evaluations[0].perplexity < 300
    assert [len(evaluation.routing_churn) for evaluation in run.evaluations] == [0, 2]
    assert 0 < max(run.evaluations[-1].routing_churn) < 1


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns(tiny_run, tmp_path, precision):
    run = read_run(train(tiny_run(steps=25, precision=precision, lr=1e-2, eval_every=0), tmp_path))
    assert run.steps[0].loss == pytest.approx(math.log(300), abs=0.4)
    assert run.steps[-1].loss < 4.7  # the words alone, without order, are worth about 4.4


@pytest.mark.parametrize(
    "strategy",
    ["none", "micro", "global:exact", "global:ema", "loss-free:momentum", "shuffle", "micro->global:2",
     "global:rare=0.4"],
)  # fmt: skip
def test_a_killed_run_resumes_to_the_same_bits(tiny_run, tmp_path, strategy):
    config = tiny_run(strategy)
    whole = train(config, tmp_path / "whole")
    killed = tmp_path / "killed"
    assert victim.train(config, killed, act="SIGKILL", at=5)[0] == -signal.SIGKILL
    assert read_run(killed).status == "running"
    assert [step.step for step in read_run(killed).steps] == [1, 2, 3, 4, 5]
    train(config, killed, resume=True)
    assert numbers(killed) == numbers(whole)
    assert_same(weights(killed), weights(whole))
    run = read_run(killed)
    assert run.status == "finished" and run.end.tokens == read_run(whole).end.tokens
    headers = [json.loads(line) for line in (killed / RECORD_NAME).read_text().splitlines() if '"header"' in line]
    assert [header["resumed_at"] for header in headers] == [0, 3]


def test_a_checkpoint_from_before_routing_churn_resumes_without_it(tiny_run, tmp_path):
    config = tiny_run()
    folder = train(config, tmp_path / "run")
    wanted = numbers(folder)
    step, state = checkpoint.load(folder / CHECKPOINTS, 3)
    assert state.pop("last_routing").dtype == torch.uint8
    checkpoint.save(folder / CHECKPOINTS, step, state)  # that of step 6 goes: it is a later one
    with open(folder / RECORD_NAME, "rb+") as file:  # as a run that was killed
        file.truncate(file.read().rindex(b'{"kind": "end"'))
    train(config, folder, resume=True)
    assert [one.routing_churn for one in read_run(folder).evaluations] == [[], []]
    for line in wanted:
        if "routing_churn" in line:
            line["routing_churn"] = []
    assert numbers(folder) == wanted


def test_resume_in_bf16_with_recompute_is_bit_equal_too(tiny_run, tmp_path):
    config = tiny_run(precision="bf16", model={"checkpointing": "reentrant", "shared_experts": 0})
    whole = train(config, tmp_path / "whole")
    victim.train(config, tmp_path / "killed", act="SIGKILL", at=4)
    train(config, tmp_path / "killed", resume=True)
    assert numbers(tmp_path / "killed") == numbers(whole)
    assert_same(weights(tmp_path / "killed"), weights(whole))


def test_killed_before_the_first_checkpoint_starts_again(tiny_run, tmp_path):
    config = tiny_run()
    whole = train(config, tmp_path / "whole")
    victim.train(config, tmp_path / "killed", act="SIGKILL", at=2)
    train(config, tmp_path / "killed", resume=True)
    assert numbers(tmp_path / "killed") == numbers(whole)
    assert (tmp_path / "killed" / RECORD_NAME).read_text().count('"kind": "header"') == 1


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_a_stopped_run_saves_says_so_and_goes_on(tiny_run, tmp_path, number):
    config = tiny_run()
    assert victim.train(config, tmp_path / "run", act=number, at=4)[0] == 130
    run = read_run(tmp_path / "run")
    assert run.status == "interrupted" and run.end.step == 4
    assert checkpoint.load_latest(tmp_path / "run" / CHECKPOINTS)[0] == 4
    train(config, tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(train(config, tmp_path / "whole"))
    assert read_run(tmp_path / "run").status == "finished"


def test_signals_are_as_before_after_a_run(tiny_run, tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    train(tiny_run(steps=1), tmp_path)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), torch.get_num_threads()) == before


def test_a_full_disk_stops_with_an_error_and_keeps_the_last_checkpoint(tiny_run, tmp_path):
    config = tiny_run(steps=9, eval_every=0)
    code, message = victim.train(config, tmp_path / "run", act="limit", at=5)  # the checkpoint of step 6 no longer fits
    assert code == OutputError.exit_code and "free disk space" in message
    run = read_run(tmp_path / "run")
    assert [step.step for step in run.steps][:5] == [1, 2, 3, 4, 5]
    assert checkpoint.load_latest(tmp_path / "run" / CHECKPOINTS)[0] == 3
    train(config, tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(train(config, tmp_path / "whole"))


def test_a_damaged_newest_checkpoint_costs_steps_not_the_run(tiny_run, tmp_path):
    config = tiny_run(checkpoint_every=2)
    victim.train(config, tmp_path / "run", act="SIGKILL", at=5)
    newest = tmp_path / "run" / CHECKPOINTS / "step_000004" / "tensors.safetensors"
    os.truncate(newest, newest.stat().st_size - 1)
    with pytest.warns(UserWarning, match="step_000004"):
        train(config, tmp_path / "run", resume=True)
    assert numbers(tmp_path / "run") == numbers(train(config, tmp_path / "whole"))


def test_nan_stops_the_run_and_keeps_the_weights_before(tiny_run, tmp_path):
    config = tiny_run("none", lr=1e30, warmup=0, clip=0.0, steps=20, checkpoint_every=0)
    with pytest.raises(StateError, match=r"(?s)finite loss and gradient.*lower train.lr") as caught:
        train(config, tmp_path)
    run = read_run(tmp_path)
    assert run.status == "failed" and run.end.message == str(caught.value)
    assert run.end.step == run.steps[-1].step >= 1
    step, state = checkpoint.load_latest(tmp_path / CHECKPOINTS)
    assert step == run.end.step
    assert all(torch.isfinite(weight).all() for weight in state["model"].values())


def test_an_existing_run_is_refused(tiny_run, tmp_path):
    config = tiny_run(steps=2)
    train(config, tmp_path)
    before = (tmp_path / RECORD_NAME).read_bytes()
    with pytest.raises(OutputError, match=r"holds record\.jsonl"):
        train(config, tmp_path)
    assert (tmp_path / RECORD_NAME).read_bytes() == before


def test_resuming_a_finished_run_changes_nothing(tiny_run, tmp_path):
    config = tiny_run(steps=2)
    train(config, tmp_path)
    before = (tmp_path / RECORD_NAME).read_bytes()
    assert train(config, tmp_path, resume=True) == tmp_path
    assert (tmp_path / RECORD_NAME).read_bytes() == before


def test_a_record_that_cannot_be_read_is_left_whole(tiny_run, tmp_path):
    config = tiny_run(steps=2)
    train(config, tmp_path)
    first, rest = (tmp_path / RECORD_NAME).read_text().split("\n", 1)
    for damaged, said in (
        ("\x00" + first[1:], "a header record"),
        (first.replace('"schema": 1', '"schema": 99'), "record schema"),
    ):
        (tmp_path / RECORD_NAME).write_text(damaged + "\n" + rest)
        with pytest.raises(DataError, match=said):
            train(config, tmp_path, resume=True)
        assert (tmp_path / RECORD_NAME).read_text() == damaged + "\n" + rest


def test_resuming_with_another_configuration_is_refused(tiny_run, tmp_path):
    train(tiny_run(steps=2), tmp_path)
    with pytest.raises(ConfigError, match=r"another train\.lr, train\.steps"):
        train(tiny_run(steps=4, lr=0.5), tmp_path, resume=True)


def test_resuming_on_other_text_is_refused(tiny_run, tmp_path, corpus_file):
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(corpus_file.read_bytes())
    config = tiny_run(data={"data": str(copy)})
    victim.train(config, tmp_path / "run", act="SIGKILL", at=4)
    copy.write_text(copy.read_text().replace("would", "could"))
    with pytest.raises(DataError, match="text that the run began with"):
        train(config, tmp_path / "run", resume=True)


def test_a_folder_that_cannot_be_made(tiny_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to make the folder"):
        train(tiny_run(steps=1), tmp_path / "file" / "run")


def test_strategies_are_paired(tiny_run, tmp_path):
    """Same weights, same data: before the first step only the routing differs, and with one gate not even that."""
    first = [read_run(train(tiny_run(name, steps=1), tmp_path / name)).steps[0] for name in ("none", "micro", "global")]
    assert first[0].loss == first[1].loss == first[2].loss


def test_accumulation_is_the_same_as_one_big_batch(tiny_run, tmp_path):
    """8 sequences as 4 micro-batches or as 1: same loss and, with the exact estimator, same weights after the steps."""
    data = {"mix": "sequence"}
    cut = train(tiny_run("global:exact", data=data, precision="fp32", micro_batches_per_pass=1), tmp_path / "cut")
    one = train(tiny_run("global:exact", data=data, precision="fp32", micro_batches=1, sequences_per_micro_batch=8),
                tmp_path / "one")  # fmt: skip
    for a, b in zip(read_run(cut).steps, read_run(one).steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)


@pytest.mark.parametrize("strategy", ["micro", "global", "global+micro", "global:ema", "sequence", "loss-free"])
def test_one_pass_trains_what_many_passes_train(tiny_run, tmp_path, strategy):
    """Left to itself a step is one pass; where estimators are compared (each second step here) it comes in pieces."""
    cut = {"micro_batches": 8, "sequences_per_micro_batch": 1, "precision": "fp32", "steps": 5}
    runs = [
        read_run(train(tiny_run(strategy, **cut, micro_batches_per_pass=most), tmp_path / str(most))) for most in (0, 2)
    ]
    for a, b in zip(runs[0].steps, runs[1].steps, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    for a, b in zip(runs[0].loads, runs[1].loads, strict=True):
        assert a.counts == b.counts
    errors = [one.relative_error["prefix"] for one in runs[0].fidelities]
    assert len(errors) == 2 and min(errors) > 0.01  # one pass would have nothing to compare


@pytest.mark.parametrize("strategy", ["global:prefix", "global:filled", "shuffle"])
def test_what_looks_at_the_pieces_of_a_step_gets_them(tiny_run, tmp_path, strategy):
    cut = {"micro_batches": 8, "sequences_per_micro_batch": 1, "steps": 3}
    left, said = (
        read_run(train(tiny_run(strategy, **cut, micro_batches_per_pass=most), tmp_path / str(most))) for most in (0, 4)
    )
    assert [step.loss for step in left.steps] == [step.loss for step in said.steps]


def test_the_load_of_a_step_of_one_pass_needs_no_counting(tiny_run, tmp_path, monkeypatch):
    from equipoise import Balancer

    counted: list[int] = []
    counting = Balancer.counting

    def noted(self):
        counted.append(self.step_count + 1)
        return counting(self)

    monkeypatch.setattr(Balancer, "counting", noted)
    cut = {"micro_batches": 8, "sequences_per_micro_batch": 1, "steps": 4, "fidelity_every": 3}
    train(tiny_run("global", **cut), tmp_path / "global")
    assert counted == [3]  # where the estimators are compared
    train(tiny_run("shuffle", **cut), tmp_path / "shuffle")
    assert counted == [3, 1, 2, 3, 4]


def test_learning_rate():
    config = TrainConfig(lr=2.0, min_lr_ratio=0.5, warmup=4, steps=20)
    rates = [learning_rate(config, step) for step in range(1, 21)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] == pytest.approx(1.0)
    assert learning_rate(dataclasses.replace(config, warmup=0), 1) < 2.0


def test_decay_is_for_matrices(tiny_run):
    from equipoise.lab.models.transformer import LanguageModel
    from equipoise.lab.training.trainer import _optimizer

    model = LanguageModel(tiny_run().model)
    groups = _optimizer(model, tiny_run().train).param_groups
    assert {p.ndim for p in groups[1]["params"]} == {1} and groups[1]["weight_decay"] == 0
    assert min(p.ndim for p in groups[0]["params"]) == 2 and groups[0]["weight_decay"] == 0.1
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_tensorboard_events_hold_the_same_numbers(tiny_run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = read_run(train(tiny_run(steps=3, tensorboard=True), tmp_path))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("train/loss")
    assert [event.step for event in losses] == [1, 2, 3]
    assert [event.value for event in losses] == pytest.approx([step.loss for step in run.steps])
    assert events.Scalars("heldout/perplexity")[0].value == pytest.approx(run.evaluations[0].perplexity)
    assert "balance/maxvio_global" in events.Tags()["scalars"]


def test_without_tensorboard_a_run_goes_on_and_says_so_once(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # an import that fails
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        folder = train(tiny_run(steps=2, tensorboard=True), tmp_path)
    assert [str(warning.message) for warning in caught if "TensorBoard" in str(warning.message)] == [
        "no TensorBoard events: the package tensorboard is missing (pip install 'equipoise[lab]')"
    ]
    assert read_run(folder).status == "finished"


def test_wall_time_of_steps_leaves_out_evaluation(tiny_run, tmp_path, monkeypatch):
    from equipoise.lab.training import trainer as module

    evaluate = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda *args, **kwargs: (time.sleep(0.5), evaluate(*args, **kwargs))[1])
    began = time.perf_counter()
    run = read_run(train(tiny_run(steps=2, eval_every=1), tmp_path))
    assert run.end.seconds < time.perf_counter() - began - 1.0, "two evaluations of half a second and more"
