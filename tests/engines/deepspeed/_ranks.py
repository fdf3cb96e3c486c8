"""Trainings under DeepSpeed, a process for each rank, and how far a balance part is from the law."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

__all__ = ["far", "train"]


def train(record: Path, folder: Path, cases: dict[str, dict[str, Any]], ranks: int = 1) -> list[dict[str, Any]]:
    """What each rank saw, by case."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    started = [
        subprocess.Popen(
            [sys.executable, str(record), "cases.json", str(rank), str(ranks), port, f"{rank}.pt"],
            cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    told = [process.communicate(timeout=900)[0] for process in started]
    assert [process.returncode for process in started] == [0] * ranks, told[0][-3000:]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def far(law: dict, bare: dict, balanced: dict, plain: dict, part: str = "") -> float:
    """Of the balance part, from that of the law, relative to it."""
    names = [name for name in law if part in name]
    assert names and set(names) <= set(balanced)
    wanted = {name: law[name].double() - bare[name].double() for name in names}
    got = {name: balanced[name].double() - plain[name].double() for name in names}
    off = sum(float((got[name] - wanted[name]).square().sum()) for name in names)
    return (off / sum(float(one.square().sum()) for one in wanted.values())) ** 0.5
