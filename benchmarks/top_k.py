"""Times how a CPU router chooses its experts against `torch.topk`, one thread.

    python benchmarks/top_k.py
    python benchmarks/top_k.py --rows 2048 --size 8,64 --size 8,512

positions: NumPy's sort of positions; keys: a sort of numbers that hold a
score's bits and its expert (`equipoise.functional.top_k`); chosen: what
`top_k_ids` makes of it, its call included. equal: keys where all scores of a
row are equal, so that each row is sorted twice. Milliseconds, medians in turn;
the ids of all are compared first.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from equipoise.functional.top_k import _by_keys, _by_positions, top_k_ids

SIZES = ["2,16", "4,32", "8,64", "8,128", "8,256", "8,384", "1,64"]


def contestants(rows: int, top_k: int, experts: int) -> dict[str, Callable[[], object]]:
    scores = torch.randn(rows, experts, generator=torch.Generator().manual_seed(0))
    given, equal = scores.numpy(), np.zeros((rows, experts), dtype=np.float32)
    want = scores.topk(top_k).indices
    found = {"positions": _by_positions(given, top_k), "keys": _by_keys(given, top_k)}
    if not all(torch.equal(torch.from_numpy(ids), want) for ids in found.values()):
        raise SystemExit(f"top-{top_k} of {experts}: other experts than torch.topk's")
    return {
        "topk": lambda: scores.topk(top_k),
        "positions": lambda: _by_positions(given, top_k),
        "keys": lambda: _by_keys(given, top_k),
        "chosen": lambda: top_k_ids(scores, top_k),
        "equal": lambda: _by_keys(equal, top_k),
    }


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", action="append", metavar="K,E", help=f"default: {' '.join(SIZES)}")
    made.add_argument("--rows", type=int, default=8192)
    made.add_argument("--rounds", type=int, default=31)
    arguments = made.parse_args()
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, NumPy {np.__version__}, {arguments.rows} rows of fp32\n")
    for number, size in enumerate(arguments.size or SIZES):
        top_k, experts = map(int, size.split(","))
        runs = contestants(arguments.rows, top_k, experts)
        took: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(arguments.rounds + 2):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                took[name].append(1e3 * (time.perf_counter() - start))
        if not number:
            print(f"{'K of E':>10}" + "".join(f"{name:>11}" for name in runs))
        print(f"{top_k:>4} of {experts:<3}" + "".join(f"{statistics.median(ms[2:]):11.2f}" for ms in took.values()))


if __name__ == "__main__":
    main()
