"""What balance inside a micro-batch is worth in seconds: steps of real expert-parallel runs, side by side.

    python benchmarks/expert_parallel.py                 # two ranks, gloo, one thread each; ten minutes
    python benchmarks/expert_parallel.py --steps 40      # a look

The paper on global balance (arXiv 2501.11873, table 5) has 1.64 s a step under the global loss and 1.59 s with one
percent of the micro-batch loss beside it: experts of one rank wait for those of another, and the more so the more
uneven a micro-batch is. Here the experts of every layer are split over two ranks. One process a rank trains a run of
each strategy on the same text, one step of each in turn, in a changing order, all ranks together at the start of each.
Wall time of the slowest rank; the first half of the steps is left out, since experts have to differ first. Ratios are
of one turn, to `micro`: median and quartiles. A micro-batch is four sequences of one domain and a pass of its own.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

STRATEGIES = ("micro", "global:filled", "global:filled+micro", "global:prefix", "none")
RANKS = 2


def configuration(strategy: str, steps: int) -> Any:
    from equipoise.lab.config.schema import ModelConfig, RunConfig, TrainConfig

    train = TrainConfig(
        precision="fp32", threads=1, fidelity_every=0, eval_every=0, checkpoint_every=0, tensorboard=False, steps=steps,
        micro_batches=8, sequences_per_micro_batch=4, micro_batches_per_pass=1,
    )  # fmt: skip
    return RunConfig(model=ModelConfig(width=128, heads=4, expert_hidden=512), train=train, strategy=strategy)


def rank(steps: int) -> None:
    """One of the processes; rank 0 prints the table."""
    import torch
    import torch.distributed as dist

    from equipoise.lab.config.schema import ParallelConfig
    from equipoise.lab.training.distributed import join
    from equipoise.lab.training.trainer import _Run

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    maxvio: dict[str, list[float]] = {name: [] for name in STRATEGIES}
    order = random.Random(0)
    with ExitStack() as stack:
        context = stack.enter_context(join(ParallelConfig(dp=RANKS, ep=RANKS)))
        folder = Path(stack.enter_context(TemporaryDirectory()))
        runs = {name: _Run(configuration(name, steps), folder / name.replace(":", "_"), context) for name in STRATEGIES}
        for run in runs.values():
            run.start(None)
            stack.callback(run.close)
        for step in range(steps):
            for name in order.sample(STRATEGIES, len(STRATEGIES)):
                dist.barrier()
                began = time.perf_counter()
                record = runs[name].train_step()
                took = torch.tensor(time.perf_counter() - began)
                dist.all_reduce(took, dist.ReduceOp.MAX)
                if step >= steps // 2:
                    seconds[name].append(took.item())
                    maxvio[name].append(record.balance["balance/maxvio_micro_batch"])
            if dist.get_rank() == 0:
                print(f"\rstep {step + 1} of {steps}", end="", file=sys.stderr, flush=True)
        if dist.get_rank() == 0:
            print(file=sys.stderr)
            print_table(seconds, maxvio)


def print_table(seconds: dict[str, list[float]], maxvio: dict[str, list[float]]) -> None:
    print(f"{'strategy':<20} {'s a step':>9} {'to micro':>9} {'quartiles':>15} {'MaxVio of a micro-batch':>24}")
    for name, own in seconds.items():
        ratios = [one / other for one, other in zip(own, seconds["micro"], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:<20} {statistics.median(own):>9.3f} {statistics.median(ratios):>9.3f} {low:>7.3f}-{high:<7.3f}"
            f" {statistics.mean(maxvio[name]):>24.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160, metavar="N", help="of each run (default 160)")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        rank(arguments.steps)
        return
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    raise SystemExit(subprocess.call([*launch, __file__, "--steps", str(arguments.steps)], env=environment))


if __name__ == "__main__":
    main()
