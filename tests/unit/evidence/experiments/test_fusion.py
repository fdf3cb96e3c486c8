"""The experiment behind M01: a stopped run goes on to the same numbers, and the claim looks at fresh seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from equipoise import ConfigError
from equipoise.evidence.claim import read_claim
from equipoise.evidence.experiment import experiment_of, trial_of
from equipoise.evidence.experiments.fusion import MEASURES, config_of
from equipoise.lab.fusion.trainer import train

ROOT = Path(__file__).resolve().parents[4]
TINY = {"layers": 1, "width": 16, "heads": 2, "experts": 4, "image_experts": 2, "hidden": 16, "steps": 3, "warmup": 1,
        "sequences": 4, "eval_sequences": 4, "vocabulary": 300, "text_tokens": 12, "levels": 5}  # fmt: skip


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, str]:
    image = pytest.importorskip("PIL.Image", reason="needs the extra images")
    rng = np.random.default_rng(0)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    for name in ("images", "text", "text/a", "text/b"):
        (tmp_path / name).mkdir()
    for number in range(20):
        image.fromarray(rng.integers(0, 256, (4, 4)).astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        for name in ("a", "b"):
            text = f"{number} " + 60 * f"one {name} three " + str(number)
            (tmp_path / "text" / name / f"{number}.txt").write_text(text)
    return {"data": str(tmp_path / "images"), "text": str(tmp_path / "text")}


def test_a_stopped_training_goes_on_to_the_same_numbers(folders, tmp_path):
    experiment = experiment_of("fusion")
    settings = experiment.settings(**TINY, **folders)
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = experiment.run("groups-choice", settings, 1, tmp_path / "whole")

    def stop(step):
        if step.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config_of("groups-choice", settings, 1), tmp_path / "parts" / "run", on_step=stop)
    assert experiment.run("groups-choice", settings, 1, tmp_path / "parts") == whole
    assert whole.numbers.keys() == MEASURES.keys() and set(whole.loss) == {"text", "image"}
    assert whole.tokens == 3 * 4 * (12 + 16 + 1)
    assert len(experiment.corpus(settings, lambda text, share: None)) == 12


def test_a_case_that_cannot_run_is_refused_when_the_claim_is_read():
    with pytest.raises(ConfigError, match="did you mean 'groups'"):
        trial_of("fusion", "group", {}, 0)
    with pytest.raises(ConfigError, match="both groups have experts"):
        trial_of("fusion", "groups", {"image_experts": 8}, 0)


def test_the_claim_judges_seeds_that_nothing_was_looked_up_in_and_can_fail():
    claim = read_claim(ROOT / "evidence" / "M01-modality-groups.toml")
    assert all(contrast.first_seed == 1 and contrast.seeds >= 3 for contrast in claim.contrast)
    assert sum(contrast.criterion != "any" for contrast in claim.contrast) >= 3
    assert {trial.case for trial in claim.runs()} == {"mixed", "mixed-classes", "groups", "groups-choice", "dense"}
