"""`equipoise fuse` with real worker processes: trained, gone on with, and a page in the end."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.storage.run_record import read_run

pytest.importorskip("PIL.Image", reason="needs the extra images")
SETTINGS = {
    "model.layers": 1, "model.width": 16, "model.heads": 2, "model.experts": 4, "model.image_experts": 2,
    "model.hidden": 16, "train.sequences": 4, "train.warmup": 1, "train.eval_every": 0, "train.eval_sequences": 4,
    "train.checkpoint_every": 0, "data.held_out": 0.25, "data.levels": 5, "data.vocabulary": 300,
    "data.text_tokens": 12,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for number in range(16):
        Image.fromarray(rng.integers(0, 256, (4, 4)).astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "text").mkdir()
    for name, words in (("a", "one two three "), ("b", "four five six ")):
        (tmp_path / "text" / name).mkdir()
        for number in range(20):
            (tmp_path / "text" / name / f"{number}.txt").write_text(f"{number} " + 60 * words + str(number))
    return ["--data", "images", "--text", "text", "--steps", "2", *(f"--set={k}={v}" for k, v in SETTINGS.items())]


def test_strategies_are_trained_reported_and_not_trained_again(tiny, tmp_path, capsys):
    command = ["fuse", "--strategies", "groups-choice", "--seeds", "1", *tiny]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "Where experts choose" in shown.out and "1 of 1 runs to train" in shown.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").read_text().lower().startswith("<!doctype html")
    assert read_run(folder / "groups-choice-seed0", "text and images").status == "finished"
    assert main(command) == 0
    assert "0 of 1 runs to train" in capsys.readouterr().err
    assert main(["report", str(folder)]) == 4
    assert "`equipoise fuse` those of text and images" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--strategies", "group"], 2, "did you mean 'groups'"),
        (["--strategy", "groups", "--seeds", "2"], 2, "--seeds with --strategy"),
        (["--strategies", ""], 2, "got: ''"),
        (["--set", "strategy=mixed"], 2, "do:  --strategy mixed"),
        (["--set", "model.image_experts=4"], 2, "both groups have experts"),
        (["--set", "model.experts=200", "--strategies", "mixed-choice"], 2, "a pool of 200 tokens or more"),
        (["--text", "nowhere"], 4, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(tiny, tmp_path, capsys, arguments, code, said):
    assert main(["fuse", *tiny, *arguments]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*/record.jsonl"))
