"""Processes that die, disks that fill up: what is left is whole, the others end at once, and the run goes on.

A few of the kills of `unit.lab.training.faults`, which does many more.
"""

from __future__ import annotations

import functools
import json
import random
import resource
import signal
import subprocess
import sys

import pytest

from equipoise.errors import OutputError, StateError
from equipoise.lab.config.schema import ParallelConfig
from equipoise.lab.training.trainer import CHECKPOINTS
from equipoise.storage import checkpoint
from equipoise.storage.run_record import RECORD_NAME, read_run
from unit.lab.training import faults

pytestmark = pytest.mark.xdist_group("ranks")  # they start several processes: not beside others that do
GRID = ParallelConfig(ep=2)


@pytest.fixture(scope="module")
def config(corpus_file):
    return faults.tiny(corpus_file, steps=16)


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """Runs that nobody killed: {processes: folder}."""
    folders = {size: tmp_path_factory.mktemp("whole") / str(size) for size in (1, 4)}
    for size, folder in folders.items():
        ended = faults.run(config, folder, size=size, layout=GRID if size > 1 else faults.ALONE)
        assert ended.codes == [0] * size
    return folders


def killed(rank: int, after: int, delay: float = 0.0):
    return functools.partial(faults.die, rank, after, delay)


@pytest.mark.parametrize("seed", range(3))
def test_one_process_killed_at_random_goes_on_to_the_same_bits(config, whole, tmp_path, seed):
    rng = random.Random(seed)
    ended = faults.run(config, tmp_path / "run", act=killed(0, rng.randrange(1, 12), rng.uniform(0, 0.03)))
    assert ended.codes == [-signal.SIGKILL]
    assert faults.run(config, tmp_path / "run").codes == [0]
    assert faults.same_bits(tmp_path / "run", whole[1]) == ""


@pytest.mark.parametrize("rank", [0, 2])
def test_one_of_four_killed_ends_the_others_at_once_and_all_go_on_to_the_same_bits(config, whole, tmp_path, rank):
    ended = faults.run(config, tmp_path / "run", size=4, layout=GRID, act=killed(rank, 6, 0.02 * rank))
    assert ended.codes[rank] == -signal.SIGKILL
    assert [code for other, code in enumerate(ended.codes) if other != rank] == [StateError.exit_code] * 3
    words = [text for other, text in enumerate(ended.said) if other != rank]
    assert all("a rank ended or hangs" in text and "resume from the last checkpoint" in text for text in words)
    rest = faults.run(config, tmp_path / "run", size=4, layout=GRID)
    assert rest.codes == [0] * 4
    assert faults.same_bits(tmp_path / "run", whole[4]) == ""


def test_the_rest_may_be_trained_by_fewer(config, whole, tmp_path):
    faults.run(config, tmp_path / "run", size=4, layout=GRID, act=killed(3, 7))
    assert [step.step for step in read_run(tmp_path / "run").steps][-1] < 16
    assert faults.run(config, tmp_path / "run").codes == [0]
    assert faults.same_losses(tmp_path / "run", whole[1]) == ""
    assert faults.same_losses(tmp_path / "run", whole[4]) == ""


def fill_the_disk(rank: int, step: int) -> None:
    """No file of rank 0 may grow above 20 kB after step 5: the kernel refuses, as it does on a full disk."""
    if rank == 0 and step == 5:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))


def test_a_full_disk_ends_all_ranks_and_keeps_the_last_checkpoint(config, whole, tmp_path):
    ended = faults.run(config, tmp_path / "run", size=4, layout=GRID, act=fill_the_disk)
    assert ended.codes == [OutputError.exit_code] * 4
    assert all("free disk space" in text for text in ended.said)
    step, _ = checkpoint.load_latest(tmp_path / "run" / CHECKPOINTS)
    assert step == 4
    assert faults.run(config, tmp_path / "run", size=4, layout=GRID).codes == [0] * 4
    assert faults.same_bits(tmp_path / "run", whole[4]) == ""


@pytest.fixture
def small_disk(whole, tmp_path):
    """A file system that two checkpoints fill, where this user may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    newest = max((whole[4] / CHECKPOINTS).iterdir())
    room = int(2.6 * sum(path.stat().st_size for path in newest.iterdir()))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", folder]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(config, whole, small_disk):
    """A third checkpoint does not fit beside the two before it: these stay, and with more room the run goes on."""
    ended = faults.run(config, small_disk / "run", size=4, layout=GRID)
    assert ended.codes == [OutputError.exit_code] * 4
    assert all("No space left" in text and "free disk space" in text for text in ended.said)
    assert checkpoint.load_latest(small_disk / "run" / CHECKPOINTS)[0] == 4
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert faults.run(config, small_disk / "run", size=4, layout=GRID).codes == [0] * 4
    assert faults.same_bits(small_disk / "run", whole[4]) == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the ranks of torchrun in /proc")
def test_torchrun_starts_a_dead_rank_again_and_the_run_ends_with_the_same_bits(corpus_file, tmp_path):
    longer = faults.tiny(corpus_file, steps=60)
    code, said = faults.run_under_torchrun(longer, tmp_path / "run", "--ep", "2", size=2, kill=(1, 7))
    assert code == 0, said
    assert said.count("a rank ended or hangs") == 1
    assert faults.run(longer, tmp_path / "whole", size=2, layout=GRID).codes == [0, 0]
    assert faults.same_bits(tmp_path / "run", tmp_path / "whole") == ""
    lines = [json.loads(line) for line in (tmp_path / "run" / RECORD_NAME).read_text().splitlines()]
    resumed = [line["resumed_at"] for line in lines if line["kind"] == "header"]
    assert len(resumed) == 2 and resumed[1] >= 6
    assert said.splitlines()[-1] == str(tmp_path / "run")  # one rank says where the run is
