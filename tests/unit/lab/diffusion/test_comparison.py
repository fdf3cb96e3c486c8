"""Which runs a comparison has, where they lie, and which pools are refused before anything is trained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from equipoise import ConfigError, DataError, InputError, OutputError
from equipoise.lab.diffusion.comparison import ROOM, check
from equipoise.lab.diffusion.images import load_images
from equipoise.lab.diffusion.trainer import TASK
from equipoise.storage.run_record import read_run


def test_a_configuration_finds_its_folder_again_and_another_one_another(config):
    assert ROOM.folder_of(config) == ROOM.folder_of(
        replace(config, strategy="dense", train=replace(config.train, seed=9))
    )
    assert ROOM.folder_of(config) != ROOM.folder_of(replace(config, train=replace(config.train, lr=0.5)))


def test_a_plan_is_seed_by_seed_and_each_run_once(config, tmp_path):
    jobs = ROOM.plan(replace(config, train=replace(config.train, seed=4)), ("batch", "samples:2", "batch"), 2, tmp_path)
    assert [job.name for job in jobs] == ["batch-seed4", "samples_2-seed4", "batch-seed5", "samples_2-seed5"]
    assert [job.config.train.seed for job in jobs] == [4, 4, 5, 5]
    for strategies, seeds in (((), 1), (("batch",), 0), (("bach",), 1)):
        with pytest.raises(ConfigError):
            ROOM.plan(config, strategies, seeds, tmp_path)


def test_pools_that_cannot_be_are_refused_at_once(config):
    images = load_images(config.data, config.model.patch)
    few = replace(config, model=replace(config.model, experts=32, patch=4))  # 4 tokens an image, 32 a batch
    check(replace(few, strategy="batch"), images)
    with pytest.raises(InputError, match=r"a pool of 32 tokens or more(.|\n)*4 tokens for 32 experts"):
        check(replace(few, strategy="sample"), images)
    with pytest.raises(ConfigError, match=r"pools that train.images divides into(.|\n)*samples:3"):
        check(replace(config, strategy="samples:3"), images)
    for name in ("global", "samples:8", "dense"):
        check(replace(few, strategy=name), images)


def test_one_run_in_this_process(config, tmp_path, capsys):
    folder = ROOM.train_one(config, tmp_path / "run", resume=False, overwrite=False, plain=True)
    assert read_run(folder, TASK).status == "finished"
    with pytest.raises(OutputError, match="a folder without a run"):
        ROOM.train_one(config, folder, resume=False, overwrite=False, plain=True)
    (folder / "mine.txt").write_text("stays")
    ROOM.train_one(config, folder, resume=False, overwrite=True, plain=False)
    assert (folder / "mine.txt").exists()
    assert "step 6/6" in capsys.readouterr().err


def test_finished_runs_are_not_trained_again_and_those_of_another_configuration_are_refused(config, tmp_path):
    ROOM.train_one(config, tmp_path / "batch-seed0", resume=False, overwrite=False, plain=True)
    before = (tmp_path / "batch-seed0" / "record.jsonl").read_bytes()
    done = ROOM.compare(config, ["batch"], 1, out=tmp_path, overwrite=False, workers=1)
    assert (done.folder, done.exit_code) == (tmp_path, 0)
    assert (tmp_path / "batch-seed0" / "record.jsonl").read_bytes() == before
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(OutputError, match="a run of this configuration in"):
        ROOM.compare(other, ["batch"], 1, out=tmp_path, overwrite=False, workers=1)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda line: line.replace('"task": "images"', '"task": "text"'), "a run of images in"),
        (lambda line: line.replace('"schema": 1', '"schema": 99'), "record schema"),
        (lambda line: "\x00" + line[1:], "a header record in"),
    ],
    ids=["of another command", "of a newer version", "garbled"],
)
def test_a_run_that_it_cannot_go_on_with_is_left_whole(config, tmp_path, damage, said):
    """Only one that was killed inside its first line begins again: that one has trained nothing."""
    folder = ROOM.train_one(config, tmp_path / "batch-seed0", resume=False, overwrite=False, plain=True)
    record = folder / "record.jsonl"
    first, rest = record.read_text().split("\n", 1)
    assert damage(first) != first
    record.write_text(damage(first) + "\n" + rest)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for again in (
        lambda: ROOM.train_one(config, folder, resume=True, overwrite=False, plain=True),
        lambda: ROOM.compare(config, ["batch"], 1, out=tmp_path, overwrite=False, workers=1),
    ):
        with pytest.raises(DataError, match=said):
            again()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    record.write_text(first[: len(first) // 2])
    assert read_run(ROOM.train_one(config, folder, resume=True, overwrite=False, plain=True), TASK).status == "finished"
