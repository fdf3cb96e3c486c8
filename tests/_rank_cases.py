"""What the ranks of test_ranks.py do."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist


def add_up(start: int) -> tuple[int, int, int]:
    value = torch.tensor(start + dist.get_rank())
    dist.all_reduce(value)
    return dist.get_rank(), dist.get_world_size(), int(value)


def process_id() -> int:
    return os.getpid()


def tensor_of(rank_times: float) -> dict[str, torch.Tensor]:
    return {"x": torch.full((3,), dist.get_rank() * rank_times, requires_grad=True)}


def one_raises_while_others_wait(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("the mistake of one rank")
    dist.all_reduce(torch.ones(1))


def one_is_killed(rank: int) -> None:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))


def one_hangs(rank: int) -> None:
    if dist.get_rank() == rank:
        time.sleep(600)


def cannot_be_sent():
    return lambda: None


def aborts(once: str) -> int:
    """Rank 1 aborts, as C++ code does that finds itself broken: the first time only where ``once`` names a file."""
    if dist.get_rank() == 1 and not (once and Path(once).exists()):
        if once:
            Path(once).touch()
        os.abort()
    dist.barrier()
    return dist.get_rank()
