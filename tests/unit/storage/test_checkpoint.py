"""A checkpoint is whole or it is not used: damage, kills and full disks."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from equipoise.errors import DataError, OutputError
from equipoise.storage.checkpoint import load_latest, save, steps
from unit.lab.training import victim


def state(value: float = 1.0) -> dict:
    weight = torch.full((64, 8), value)
    return {
        "model": {"a.weight": weight, "tied.weight": weight},  # one memory, as tied embeddings have
        "optimizer": {"a.weight": {"step": torch.tensor(3.0), "exp_avg": torch.randn(64, 8).bfloat16()}},
        "balancer": {"layers": [{"name": "x", "ema": [(0.9, 1.25, torch.arange(4.0).double())], "previous": None}]},
        "random_state": torch.get_rng_state(),
        "seconds": 0.1 + 0.2,
        "tokens": 2**60 + 1,
        "nan": float("nan"),
    }


def equal(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b or (a != a and b != b)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_everything_comes_back_bit_for_bit(tmp_path):
    saved = state()
    save(tmp_path, 7, saved)
    step, loaded = load_latest(tmp_path)
    assert step == 7 and equal(loaded, saved)
    assert names(tmp_path / "step_000007") == ["manifest.json", "tensors.safetensors"]


def test_who_may_read_the_folder_may_read_all_of_it(tmp_path):
    """A colleague resumes or exports; safetensors makes files for their owner alone."""
    before = os.umask(0o022)
    try:
        folder = save(tmp_path / "run", 1, {"w": torch.ones(2)})
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}


def test_there_is_no_pickle_in_it(tmp_path):
    folder = save(tmp_path, 1, state())
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b"\x80", b"PK"))
    json.loads((folder / "manifest.json").read_text())


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_the_two_newest_stay(tmp_path):
    for step in (5, 999999, 1000000):
        save(tmp_path, step, {"x": torch.ones(1)})
    assert names(tmp_path) == ["step_1000000", "step_999999"]
    assert load_latest(tmp_path)[0] == 1000000


def test_none_goes_where_all_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, {"step": step}, keep=0)
    assert steps(tmp_path) == [4, 3, 2, 1]


def test_going_back_gives_up_what_came_after(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step, {"x": torch.ones(1)})
    save(tmp_path, 21, {"x": torch.zeros(1)})
    assert names(tmp_path) == ["step_000020", "step_000021"]


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5, {"x": torch.ones(1)})
    save(tmp_path, 5, {"x": torch.zeros(1)})
    assert load_latest(tmp_path)[1]["x"].item() == 0


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 0x10
    path.write_bytes(content)


DAMAGE = {
    "bit in a tensor": lambda folder: flip(folder / "tensors.safetensors", -20),
    "bit in the tensors' header": lambda folder: flip(folder / "tensors.safetensors", 30),
    "tensors cut": lambda folder: os.truncate(folder / "tensors.safetensors", 1000),
    "tensors empty": lambda folder: os.truncate(folder / "tensors.safetensors", 0),
    "tensors gone": lambda folder: (folder / "tensors.safetensors").unlink(),
    "manifest cut": lambda folder: os.truncate(folder / "manifest.json", 50),
    "manifest gone": lambda folder: (folder / "manifest.json").unlink(),
    "manifest altered": lambda folder: (folder / "manifest.json").write_text(
        (folder / "manifest.json").read_text().replace('"step": 2', '"step": 3')
    ),
    "manifest of something else": lambda folder: (folder / "manifest.json").write_text("[1, 2]"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(tmp_path, damage):
    save(tmp_path, 1, state(1.0))
    damage(save(tmp_path, 2, state(2.0)))
    with pytest.warns(UserWarning, match="step_000002.*using the one before"):
        step, loaded = load_latest(tmp_path)
    assert step == 1 and loaded["model"]["a.weight"][0, 0] == 1.0


def test_every_bit_of_the_tensors_is_guarded(tmp_path):
    folder = save(tmp_path, 1, {"x": torch.arange(4.0)})
    size = (folder / "tensors.safetensors").stat().st_size
    for position in range(size):
        flip(folder / "tensors.safetensors", position)
        with pytest.raises(DataError, match="a whole checkpoint"):
            load_latest(tmp_path)
        flip(folder / "tensors.safetensors", position)
    assert load_latest(tmp_path)[0] == 1


def test_only_damaged_ones_is_an_error_that_names_each(tmp_path):
    for step in (1, 2):
        os.truncate(save(tmp_path, step, state()) / "tensors.safetensors", 100)
    with pytest.warns(UserWarning, match="step_000002"), pytest.raises(DataError, match=r"step_000002.*step_000001"):
        load_latest(tmp_path)


def test_what_a_killed_save_left_behind_is_not_used_and_is_cleared(tmp_path):
    save(tmp_path, 1, state())
    (tmp_path / "step_000002.tmp").mkdir()
    (tmp_path / "step_000002.tmp" / "tensors.safetensors").write_bytes(b"half")
    assert load_latest(tmp_path)[0] == 1
    save(tmp_path, 2, state())
    assert names(tmp_path) == ["step_000001", "step_000002"]


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path):
    save(tmp_path, 1, state(1.0))
    for limit in (100, 1500, 6000):  # in the first bytes, in the tensors, in the manifest
        code, message = victim.save(tmp_path, 2, state(2.0), limit=limit)
        assert code == OutputError.exit_code
        assert message.startswith("expected to write a checkpoint") and "free disk space" in message
        assert names(tmp_path) == ["step_000001"]
    assert load_latest(tmp_path)[0] == 1


def test_a_folder_that_cannot_be_made_is_an_output_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="to write a checkpoint"):
        save(tmp_path / "file", 1, state())


@pytest.mark.parametrize("attempt", range(4))
def test_a_kill_at_any_moment_leaves_a_whole_checkpoint(tmp_path, attempt):
    assert victim.save_until_killed(tmp_path, state(), seconds=0.05 + 0.013 * attempt) == -signal.SIGKILL
    step, loaded = load_latest(tmp_path)  # no warning: nothing that counts as a checkpoint is ever half written
    assert loaded["step"] == step >= 1
