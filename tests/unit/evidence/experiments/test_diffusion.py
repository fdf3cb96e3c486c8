"""The experiment behind D01: its numbers are means over thirds of the noise levels, and a stopped run goes on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from equipoise import ConfigError
from equipoise.evidence.claim import read_claim
from equipoise.evidence.experiment import experiment_of, trial_of
from equipoise.evidence.experiments.diffusion import MEASURES, config_of, numbers_of
from equipoise.lab.diffusion.trainer import train
from equipoise.storage.run_record import Evaluation

ROOT = Path(__file__).resolve().parents[4]
TINY = {"layers": 2, "width": 16, "heads": 2, "experts": 4, "hidden": 16, "steps": 4, "images": 8,
        "images_per_micro_batch": 4, "warmup": 1, "levels": 3, "draws": 1}  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> str:
    image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(20):
        image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return str(tmp_path / "images")


def test_the_numbers_of_an_evaluation():
    losses = [0.6, 0.4, 0.3, 0.2, 0.1, 0.2]
    names = [str(level) for level in range(6)]
    counts = [
        [[4, 4], [2, 6]],
        [[6, 6], [2, 2]],
        [[5, 5], [5, 5]],
        [[5, 5], [5, 5]],
        [[3, 1], [2, 2]],
        [[2, 2], [1, 3]],
    ]
    found = numbers_of(
        Evaluation(
            step=1, loss=dict(zip(names, losses, strict=True)), bits_per_byte={}, tokens=dict.fromkeys(names, 10),
            counts=counts, topk_score=[], maxvio_sequence=[], maxvio_micro_batch=[], maxvio_global=[0.2, 0.4],
            dead_experts=[], mutual_information=[0.1, 0.3], mutual_information_shuffled=[],
        )
    )  # fmt: skip
    assert found.keys() == MEASURES.keys()
    assert found == pytest.approx({
        "error": 0.3, "error clean": 0.5, "error middle": 0.25, "error noisy": 0.15, "experts clean": (0.8 + 0.8) / 2,
        "experts middle": 1.0, "experts noisy": 0.4, "experts clean - noisy": 0.4, "experts": 2.2 / 3,
        "information": 0.2, "maxvio": 0.3,
    })  # fmt: skip


def test_a_stopped_training_goes_on_to_the_same_numbers(folder, tmp_path):
    experiment = experiment_of("diffusion")
    settings = experiment.settings(**TINY, data=folder)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = experiment.run("batch", settings, 1, tmp_path / "whole")

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of("batch", settings, 1), tmp_path / "parts" / "run", on_step=stop)
    assert experiment.run("batch", settings, 1, tmp_path / "parts") == whole
    assert whole.tokens == 4 * 8 * 16 and whole.numbers.keys() == MEASURES.keys()
    assert len(experiment.corpus(settings, lambda text, share: None)) == 12


def test_a_case_that_cannot_run_is_refused_when_the_claim_is_read():
    with pytest.raises(ConfigError, match="did you mean 'batch'"):
        trial_of("diffusion", "bach", {}, 0)
    with pytest.raises(ConfigError, match="0 < capacity"):
        trial_of("diffusion", "batch", {"capacity": 9.0}, 0)


def test_the_claim_judges_seeds_that_nothing_was_looked_up_in():
    claim = read_claim(ROOT / "evidence" / "D01-batch-pool.toml")
    assert all(contrast.first_seed == 1 and contrast.seeds >= 3 for contrast in claim.contrast)
    assert {trial.case for trial in claim.runs()} == {"batch", "sample", "global", "micro", "dense"}
