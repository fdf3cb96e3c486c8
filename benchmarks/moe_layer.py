"""Times the MoE layer, forward + backward, routing included, against every layer that does the same on a CPU.

    python benchmarks/moe_layer.py                # three sizes and their goals
    python benchmarks/moe_layer.py --size 1024,128,128,16,2 --dtype all --skew 2
    python benchmarks/moe_layer.py --grid         # a sample of the grid
    python benchmarks/moe_layer.py --grid --dtype fp32 --threads 2
    python benchmarks/moe_layer.py --grid full    # all of it: half a day

Contestants: ours; index_add and unsort, F.grouped_mm behind the same router
with two ways to add up; hf-grouped, hf-eager and hf-batched, transformers'
Qwen3-MoE block under each experts_implementation that a CPU has (its deepgemm
and sonicmoe are for GPUs); dense, a SwiGLU without a router that has the FLOPs
of the K active experts. Same weights, same tokens; outputs and gradients are
compared first, and what differs is not timed.

Every call gets new tokens, so that loads, and with them the shapes of all
products, are new as in training. Tokens of a call share a direction, drawn for
that call, --skew times as large as what is each token's own: 0 = loads as even
as chance leaves them, 2 = a few experts get most (MaxVio is printed).

Contestants take turns in a random order, each in a process of its own: the
kernels and the memory that one has made ready must neither serve another nor
push its own out. Who needs more than 10x the best time (and than a second) at
its first calls, or would copy more than 2 GiB of weights, does not take part.
A table of all medians comes last; there they have a dash.
One thread: CPU time. Two: wall time. "ratio" is the best peer's time over ours
inside each round: median and quartiles.

The grid: T 256..16384, E 8..256, K 1..8, three widths, skew 0 and 2, bf16 and
fp32, one thread and two. The sample has every pair of values of two axes, and
the corners of T x E x K. Each point is a line of --out when it is done: a run
that was killed goes on from there.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import Any

from _contest import everybody, measure, present
from _contestants import DTYPES, Point
from _grid import AXES, every, run, sample, worst
from _report import add_json, figure, machine, save, versions

GOALS = {  # size: (what is divided by what, the goal in words, its limit); a ratio of 1 or less is a goal reached
    "8192,128,128,16,2": 60.0,
    "8192,256,128,64,8": 290.0,
    "2048,512,256,32,4": None,  # as fast as 0.8 of dense
}
OF_DENSE = 0.8
HEADER = (
    f"{'T,D,H,E,K':>19} skew thr dtype MaxVio {'ours, ms':>16} {'best peer':>10} {'ms':>7} {'ratio':>15} {'dense':>6}"
)


def goal(found: dict[str, Any]) -> str:
    """What was to be reached at a size, on one thread in bfloat16, and whether it was."""
    point = Point(**found["point"])
    if point.size not in GOALS or (point.dtype, point.threads) != ("bf16", 1):
        return ""
    ours, dense = found["ms"]["ours"][1], found["ms"]["dense"][1]
    if (limit := GOALS[point.size]) is not None:
        return f"{'':>19} goal: {limit:.0f} ms or less; {'reached' if ours <= limit else 'not reached'}\n"
    said = f"goal: {OF_DENSE} of dense's speed; got {dense / ours:.2f}"
    return f"{'':>19} {said}\n"


def show(found: list[dict[str, Any]], line: dict[str, Any]) -> None:
    found.append(line)
    print(present(line) + "\n" + goal(line), end="", flush=True)


def drawn(found: dict[str, Any]) -> dict[str, Any]:
    """Everybody at a point, the fastest first."""
    point, fast = Point(**found["point"]), sorted(found["ms"], key=lambda name: found["ms"][name][1])
    return figure(
        f"{point.tokens} tokens, width {point.dim}, {point.experts} experts of {point.hidden}, top-{point.top_k}, "
        f"{point.dtype}, {point.threads} thread(s)",
        "ms of forward + backward",
        [(name, found["ms"][name]) for name in fast],
    )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", action="append", metavar="T,D,H,E,K", help="tokens, width, expert width, experts, K")
    made.add_argument("--dtype", choices=[*DTYPES, "all"], help="mixed: bf16 tokens, fp32 weights")
    made.add_argument("--threads", type=int, help="default 1; of the grid 1 and 2")
    made.add_argument("--skew", type=float, help="default 0.25; of the grid 0 and 2")
    made.add_argument("--rounds", type=int, default=20)
    made.add_argument("--grid", nargs="?", const="sample", choices=["sample", "full"])
    made.add_argument("--out", type=Path, default=Path("runs/moe_grid.jsonl"), help="of the grid")
    made.add_argument("--seconds", type=float, help="for a point, about: default 50, of the grid 20")
    made.add_argument("--limit", type=float, default=float("inf"), help="seconds: no new point of the grid after them")
    add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    where = {"machine": machine(), "versions": versions("torch", "transformers")}
    print(f"{where['machine']}; {where['versions']}")
    print("milliseconds of forward + backward: median, quartiles; ratio: best peer / ours in each round\n")
    print(HEADER, flush=True)
    found: list[dict[str, Any]] = []
    if arguments.grid:
        fixed = {
            name: (value,) for name in ("dtype", "threads", "skew") if (value := vars(arguments)[name]) is not None
        }
        axes = {**AXES, **fixed}
        points = sample(axes) if arguments.grid == "sample" else every(axes)
        timed = functools.partial(measure, rounds=arguments.rounds, budget=arguments.seconds or 20)
        for line in run(points, timed, arguments.out, where, arguments.limit):
            show(found, line)
        print(f"\n{worst(found)}\n\nmedians of all\n\n{everybody(found)}")
        return
    skew = 0.25 if arguments.skew is None else arguments.skew
    for dtype in DTYPES if arguments.dtype == "all" else [arguments.dtype or "bf16"]:
        for size in arguments.size or GOALS:
            tokens, dim, hidden, experts, top_k = map(int, size.split(","))
            point = Point(tokens, dim, hidden, experts, top_k, dtype, arguments.threads or 1, skew)
            show(found, measure(point, arguments.rounds, arguments.seconds or 50))
    print(f"\nmedians of all\n\n{everybody(found)}")
    save(arguments.json, [drawn(line) for line in found])


if __name__ == "__main__":
    main()
