"""Trainings with an engine in processes of their own, one a rank: started, watched, and what each wrote is read."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["free_port", "in_group", "moved_by_sign", "of_steps", "run_ranks", "train_ranks"]

QUIET = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def run_ranks(
    folder: Path,
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]] | None = None,
    *,
    timeout: float = 1800,
) -> None:
    """Runs one command a rank; where one fails the others are ended, because they would wait for it.

    What they print goes to files, so that none waits for a reader.
    """
    started = []
    for rank, command in enumerate(commands):
        env = os.environ | QUIET | dict(environments[rank] if environments else {})
        with (folder / f"log.{rank}").open("w") as log:
            started.append(subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT))
    end = time.monotonic() + timeout
    try:
        while any(process.poll() is None for process in started):
            if any(process.poll() for process in started) or time.monotonic() > end:
                break
            time.sleep(0.2)
    finally:
        failed = [rank for rank, process in enumerate(started) if process.poll() != 0]
        died = [rank for rank in failed if started[rank].poll() is not None]
        for process in started:
            if process.poll() is None:
                process.kill()
            process.wait()
    said = "".join(f"rank {rank}: {(folder / f'log.{rank}').read_text()[-4000:]}\n" for rank in died or failed)
    assert not failed, said


def train_ranks(
    record: Path, folder: Path, cases: Mapping[str, Any], ranks: int = 1, *, meet: str | None = None
) -> list[dict[str, Any]]:
    """What each rank of ``record.py CASES.json RANK WORLD MEET OUT.pt`` saw, by case; they meet at a file or a port."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    meet = str(folder / "store") if meet is None else meet
    command = [sys.executable, str(record), "cases.json"]
    run_ranks(folder, [[*command, str(rank), str(ranks), meet, f"{rank}.pt"] for rank in range(ranks)])
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def in_group(main: Callable[[dict[str, dict[str, Any]], Path], None]) -> None:
    """The end of such a record whose ranks meet at a file."""
    cases, rank, world, store, out = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(world))
    main(json.loads(Path(cases).read_text()), Path(out))
    dist.barrier()
    dist.destroy_process_group()


def of_steps(logits: Sequence[Sequence[Sequence[Tensor]]], layer: int, steps: int) -> list[Tensor]:
    """(T, E) of each step from what every rank saw, two micro-batches a step, (B, S, E) a layer."""
    return [
        torch.cat([one[layer].flatten(0, 1) for of_rank in logits for one in of_rank[2 * step : 2 * step + 2]])
        for step in range(steps)
    ]


def moved_by_sign(
    logits_TE: Sequence[Tensor],
    scores: Callable[[Tensor], Tensor],
    top_k: int,
    rate: float,
    loads: Sequence[list[int]] | None = None,
) -> Tensor:
    """(E,) the bias of a layer after some steps that choose by score and bias: moved by the load of all ranks.

    ``logits_TE``: of each step, all ranks; ``loads``: what the balancer counted, which has to be what was chosen.
    """
    bias_E = torch.zeros(logits_TE[0].shape[1], dtype=torch.float64)
    for step, step_TE in enumerate(logits_TE):
        chosen = (scores(step_TE.double()) + bias_E).topk(top_k).indices
        counts_E = torch.bincount(chosen.flatten(), minlength=len(bias_E)).double()
        assert loads is None or loads[step] == counts_E.long().tolist()
        moved_E = rate * (counts_E.mean() - counts_E).sign()
        bias_E += moved_E - moved_E.mean()
    return bias_E
