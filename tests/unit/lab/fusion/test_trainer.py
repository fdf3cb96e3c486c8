"""A run is a function of its configuration: stopped and resumed it gives the same bits; what it is compared by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from equipoise import ConfigError, InputError
from equipoise.lab.fusion.comparison import ROOM, check
from equipoise.lab.fusion.page import render_html
from equipoise.lab.fusion.summary import read_runs, summarize
from equipoise.lab.fusion.text import render
from equipoise.lab.fusion.trainer import TASK, train
from equipoise.storage.run_record import read_run
from unit.lab.diffusion.test_trainer import weights


def numbers(folder) -> tuple:
    run = read_run(folder, TASK)
    metrics = [{name: value for name, value in step.balance.items() if "seconds" not in name} for step in run.steps]
    return [step.loss for step in run.steps], [step.grad_norm for step in run.steps], metrics, run.evaluations


@pytest.mark.parametrize("strategy", ["groups-choice", "groups"])
def test_stopped_and_resumed_it_gives_the_same_bits(config, tmp_path, strategy):
    config = replace(config, strategy=strategy, train=replace(config.train, steps=4, eval_every=0, checkpoint_every=0))
    whole = train(config, tmp_path / "whole")

    def stop(step):
        if step.step == 3:
            raise KeyboardInterrupt

    parts = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        train(config, parts, resume=True, on_step=stop)
    train(config, parts, resume=True)
    assert numbers(parts) == numbers(whole)
    assert all((tensor == weights(parts)[name]).all() for name, tensor in weights(whole).items())
    with pytest.raises(ConfigError, match=r"another train\.lr"):
        train(replace(config, train=replace(config.train, lr=1.0)), parts, resume=True)


def test_it_learns_both_modalities(config, tmp_path):
    long = replace(config.train, steps=36, eval_every=6, checkpoint_every=0, lr=8e-3)
    found = numbers(train(replace(config, train=long), tmp_path / "run"))
    assert np.mean(found[0][-5:]) < 0.8 * np.mean(found[0][:5])
    first, last = found[3][0], found[3][-1]
    assert all(last.loss[name] < first.loss[name] - 0.1 for name in ("text", "image"))


def test_experts_that_would_choose_from_too_few_tokens_are_refused_at_once(config, fused):
    few = replace(
        config, model=replace(config.model, experts=80, image_experts=4), train=replace(config.train, sequences=1)
    )
    check(replace(few, strategy="groups"), fused)
    with pytest.raises(InputError, match=r"a pool of 76 tokens or more"):
        check(few, fused)


def test_runs_are_compared_as_text_and_page(config, tmp_path):
    """Two strategies of two seeds: tables of at most 80 columns, equal pages from equal runs."""
    short = replace(config, train=replace(config.train, steps=2, eval_every=0, checkpoint_every=0))
    for job in ROOM.plan(short, ("mixed", "groups-choice"), 2, tmp_path):
        train(job.config, job.folder)
    compared = summarize(read_runs(tmp_path, ("mixed", "groups-choice")))
    assert [one.name for one in compared.strategies] == ["mixed", "groups-choice"] and compared.baseline == "mixed"
    other, base = compared.strategies[1], compared.strategies[0]
    difference = other.differences["text"]
    assert difference.n == 2 and base.differences["text"] is None
    assert difference.mean == pytest.approx(other.mean("loss text") - base.mean("loss text"))
    text = render(compared)
    assert max(map(len, text.splitlines())) <= 80 and "Where experts choose" in text and "193" not in text
    page = render_html(compared)
    assert page == render_html(compared) and "equipoise fuse" in page and page.count('class="chart map"') == 2 * 2
