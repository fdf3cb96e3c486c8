"""`equipoise diffuse` with real worker processes: trained, gone on with, extended, and a page in the end."""

from __future__ import annotations

import numpy as np
import pytest

from equipoise.cli import main
from equipoise.storage.run_record import read_run

pytest.importorskip("PIL.Image", reason="needs the extra images")
SETTINGS = {
    "model.layers": 2, "model.width": 16, "model.heads": 2, "model.experts": 4, "model.hidden": 16, "train.images": 8,
    "train.images_per_micro_batch": 4, "train.warmup": 1, "train.eval_every": 2, "train.levels": 2, "train.draws": 1,
    "train.samples": 1, "train.sample_steps": 2, "train.checkpoint_every": 2, "data.held_out": 0.25,
}  # fmt: skip


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    from PIL import Image

    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(16):
        Image.fromarray(rng.integers(0, 256, (8, 8)).astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
    return ["--data", str(tmp_path / "images"), "--steps", "4", *(f"--set={k}={v}" for k, v in SETTINGS.items())]


def test_strategies_are_paired_reported_and_extended(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["diffuse", "--strategies", "sample,batch", "--seeds", "1", *tiny]) == 0
    shown = capsys.readouterr()
    assert "Error at each noise level" in shown.out and "2 of 2 runs to train" in shown.err
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "report.html").read_text().lower().startswith("<!doctype html")
    runs = {name: read_run(folder / f"{name}-seed0", "images") for name in ("sample", "batch")}
    assert [run.status for run in runs.values()] == ["finished", "finished"]
    assert runs["sample"].steps[0].loss == runs["batch"].steps[0].loss
    before = (folder / "batch-seed0" / "record.jsonl").read_bytes()
    assert main(["diffuse", "--strategies", "batch,dense", "--seeds", "1", *tiny]) == 0
    assert "1 of 2 runs to train" in capsys.readouterr().err
    assert (folder / "batch-seed0" / "record.jsonl").read_bytes() == before
    assert main(["report", str(folder)]) == 4
    assert "`equipoise diffuse` reads runs of images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--strategies", "bach"], 2, "did you mean 'batch'"),
        (["--strategy", "batch", "--seeds", "2"], 2, "--seeds with --strategy"),
        (["--continue"], 2, "--continue without --strategy"),
        (["--set", "model.capacity=5"], 2, "0 < capacity <= num_experts"),
        (["--set", "model.patch=8", "--strategies", "sample"], 2, "a pool of 4 tokens or more"),
        (["--seeds", "0"], 2, "--seeds of 1 or more"),
        (["--workers", "-1"], 2, "--workers of 1 or more"),
        (["--strategies", "sample,batch", "--baseline", "micro"], 2, "for --baseline"),
        (["--data", "nowhere"], 4, "a folder of images at"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_trained(
    tiny, tmp_path, capsys, monkeypatch, arguments, code, said
):
    monkeypatch.chdir(tmp_path)
    assert main(["diffuse", *tiny, *arguments]) == code
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("runs/*/*/record.jsonl"))


def test_settings_are_printed_as_a_file_that_gives_them_again(tiny, tmp_path, capsys):
    assert main(["diffuse", *tiny, "--print-config"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "run.toml").write_text(printed)
    assert main(["diffuse", str(tmp_path / "run.toml"), "--print-config"]) == 0
    assert capsys.readouterr().out == printed
