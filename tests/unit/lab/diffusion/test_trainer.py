"""A run is a function of its configuration: stopped and resumed it gives the same bits; what differs is refused."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise import ConfigError, DataError, OutputError, StateError
from equipoise.lab.diffusion.trainer import SAMPLES_NAME, TASK, train
from equipoise.storage import checkpoint
from equipoise.storage.run_record import read_run


def weights(folder) -> dict[str, torch.Tensor]:
    found = checkpoint.load_latest(folder / checkpoint.FOLDER)
    assert found is not None
    return {**found[1]["model"], **{f"moment {at} {name}": tensor for at, held in found[1]["optimizer"]["state"].items()
                                    for name, tensor in held.items()}}  # fmt: skip


def numbers(folder) -> tuple:
    run = read_run(folder, TASK)
    metrics = [{name: value for name, value in step.balance.items() if "seconds" not in name} for step in run.steps]
    return [step.loss for step in run.steps], [step.grad_norm for step in run.steps], metrics, run.evaluations


@pytest.mark.parametrize("strategy", ["batch", "samples:2", "sample", "global", "loss-free", "dense"])
def test_stopped_and_resumed_it_gives_the_same_bits(config, tmp_path, strategy):
    config = replace(config, strategy=strategy)
    whole = train(config, tmp_path / "whole")

    def stop(step):
        if step.step in (3, 5):
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, parts, resume=True, on_step=stop)
        assert read_run(parts, TASK).status == "interrupted"
    train(config, parts, resume=True)
    assert numbers(parts) == numbers(whole)
    assert all(torch.equal(tensor, weights(parts)[name]) for name, tensor in weights(whole).items())
    assert (parts / SAMPLES_NAME).read_bytes() == (whole / SAMPLES_NAME).read_bytes()
    assert read_run(parts, TASK).status == "finished"


@pytest.mark.parametrize("kind", ["reentrant", "non_reentrant"])
def test_recompute_changes_nothing_and_moves_thresholds_once(config, tmp_path, kind):
    plain = train(config, tmp_path / "plain")
    again = train(replace(config, model=replace(config.model, checkpointing=kind)), tmp_path / kind)
    name = "blocks.1.feed_forward.gate.thresholds"
    assert weights(plain)[name].isfinite().all()
    for name, tensor in weights(plain).items():
        torch.testing.assert_close(weights(again)[name], tensor, msg=name)


def test_runs_of_a_seed_see_the_same_images_and_noise(config, tmp_path):
    first = [
        numbers(train(replace(config, strategy=name), tmp_path / name))[0][0] for name in ("batch", "sample", "dense")
    ]
    assert len(set(first)) == 1, "a new model says 0 whatever its layers are: the first loss is that of the data"
    other = replace(config, train=replace(config.train, seed=1))
    assert numbers(train(other, tmp_path / "other"))[0][0] != first[0]


def test_it_learns(config, tmp_path):
    config = replace(config, train=replace(config.train, steps=40, eval_every=20, checkpoint_every=0, lr=5e-3))
    losses = numbers(train(config, tmp_path / "run"))[0]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])


def test_a_finished_run_is_left_as_it_is_and_another_configuration_is_refused(config, tmp_path):
    folder = train(config, tmp_path / "run")
    before = (folder / "record.jsonl").read_bytes()
    assert train(config, folder, resume=True) == folder
    assert (folder / "record.jsonl").read_bytes() == before
    with pytest.raises(OutputError, match="a folder without a run"):
        train(config, folder)
    with pytest.raises(ConfigError, match=r"another strategy, train.lr"):
        train(replace(config, strategy="sample", train=replace(config.train, lr=1.0)), folder, resume=True)


def test_other_images_than_it_began_with_are_refused(config, folder, tmp_path):
    images = tmp_path / "images"
    shutil.copytree(folder, images)
    config = replace(config, data=replace(config.data, data=str(images)))

    def stop(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", on_step=stop)
    next((images / "left").iterdir()).unlink()
    with pytest.raises(DataError, match="the images that the run began with"):
        train(config, tmp_path / "run", resume=True)


def test_a_run_that_diverges_says_so_and_is_saved(config, tmp_path):
    config = replace(config, train=replace(config.train, lr=1e12, clip=0.0, steps=30))
    with pytest.raises(StateError, match="a finite loss and gradient at step"):
        train(config, tmp_path / "run")
    run = read_run(tmp_path / "run", TASK)
    assert run.status == "failed" and "lower train.lr" in run.end.message
    assert checkpoint.steps(tmp_path / "run" / checkpoint.FOLDER)[0] == run.steps[-1].step


def test_what_the_header_says(config, tmp_path):
    for name, experts in (("batch", 4), ("global", 4), ("dense", 1)):
        header = read_run(train(replace(config, strategy=name), tmp_path / name), TASK).header
        assert (header.task, header.num_layers, header.num_experts, header.top_k) == ("images", 2, experts, 1)
        idle = 0 if name == "dense" else 2 * 3 * (3 * 16 * 16)  # of 4 experts of 3 matrices in 2 layers one is active
        assert header.parameters - header.active_parameters == idle
    with pytest.raises(DataError, match="a run of text"):
        read_run(tmp_path / "batch")
