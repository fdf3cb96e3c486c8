"""The pool of processes itself: results in order, and what a test sees when a rank raises, dies or hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ranks import Pool, RankError

pytestmark = pytest.mark.xdist_group("ranks")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("size", [1, 2, 4])
def test_results_come_in_rank_order(ranks, size):
    assert ranks.run("_rank_cases:add_up", 10, size=size) == [
        (rank, size, 10 * size + sum(range(size))) for rank in range(size)
    ]


def test_tensors_come_back(ranks):
    found = ranks.run("_rank_cases:tensor_of", 2.5)
    assert torch.equal(found[1]["x"], torch.full((3,), 2.5)) and found[1]["x"].requires_grad


def test_a_second_case_runs_in_the_same_processes(ranks):
    assert ranks.run("_rank_cases:process_id", size=4) == ranks.run("_rank_cases:process_id", size=4) == ranks.pids()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_of_one_rank_is_raised_with_its_traceback(ranks, rank):
    before = ranks.run("_rank_cases:process_id", size=4)
    with pytest.raises(RankError, match="the mistake of one rank") as caught:
        ranks.run("_rank_cases:one_raises_while_others_wait", rank)
    assert (caught.value.rank, caught.value.kind) == (rank, "ValueError")
    assert "one_raises_while_others_wait" in caught.value.report
    assert ranks.run("_rank_cases:process_id", size=4) == before, "nobody hung, so nobody had to be started again"


def test_what_cannot_be_pickled_is_an_error_of_the_rank(ranks):
    with pytest.raises(RankError, match="pickle"):
        ranks.run("_rank_cases:cannot_be_sent")


def test_an_unknown_function_is_an_error_of_the_rank(ranks):
    with pytest.raises(RankError, match="has no attribute 'nothing'"):
        ranks.run("_rank_cases:nothing")


def test_more_ranks_than_there_are(ranks):
    with pytest.raises(ValueError, match="size 5 of a pool of 4"):
        ranks.run("_rank_cases:add_up", 1, size=5)


def test_a_killed_rank_is_named_and_the_pool_comes_back(ranks):
    before = ranks.run("_rank_cases:process_id", size=4)
    with pytest.raises(RankError) as caught:
        ranks.run("_rank_cases:one_is_killed", 1)
    assert (caught.value.rank, caught.value.kind) == (1, "died")
    assert "exit code -9" in caught.value.report
    assert not any(alive(pid) for pid in before)
    assert len(ranks.run("_rank_cases:add_up", 0)) == 2


def test_an_abort_below_python_is_tried_once_more_and_said(ranks, tmp_path):
    with pytest.warns(RuntimeWarning, match=r"(?s)a rank aborted, and _rank_cases:aborts.*exit code -6.*in aborts"):
        assert ranks.run("_rank_cases:aborts", str(tmp_path / "first"), size=2) == [0, 1]
    with pytest.warns(RuntimeWarning), pytest.raises(RankError) as caught:
        ranks.run("_rank_cases:aborts", "", size=2)
    assert (caught.value.rank, caught.value.kind) == (1, "aborted")


def test_a_hanging_rank_is_named_with_its_stack():
    with Pool(2) as pool:
        pool.run("_rank_cases:add_up", 0)
        with pytest.raises(RankError, match="one_hangs") as caught:
            pool.run("_rank_cases:one_hangs", 1, timeout=1)
        assert (caught.value.rank, caught.value.kind) == (1, "hung")
        assert pool.pids() == []


def test_no_process_outlives_its_parent(tmp_path):
    """Also when the parent is killed while its ranks wait for one another."""
    script = (
        "from ranks import Pool\n"
        "if __name__ == '__main__':\n"
        "    pool = Pool(2)\n"
        "    pool.run('_rank_cases:add_up', 0)\n"
        "    print(*pool.pids(), flush=True)\n"
        "    pool.run('_rank_cases:one_hangs', 1)\n"
    )
    file = tmp_path / "parent.py"
    file.write_text(script)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    parent = subprocess.Popen([sys.executable, str(file)], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    assert len(pids) == 2 and all(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until = time.monotonic() + 20
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(alive(pid) for pid in pids)
