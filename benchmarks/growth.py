"""How a training step of an MoE stack with a balancer grows with tokens, experts, K, layers and ranks.

    python benchmarks/growth.py                          # under three minutes
    python benchmarks/growth.py --svg docs/growth.svg    # and the figure

A step: forward, backward and optimizer step (SGD) of L residual MoE layers of
width 64 in float32, with a global-batch loss and a bias rule. From one base
point one axis grows at a time.

ms: CPU time of one thread, all points of an axis in turn: median, quartiles.
operations, MB touched: counted below autograd, those inside our own operators
among them; the bytes of all tensors that an operation reads or writes.
slope: s of time ~ x^s over the last two doublings; 1 is proportional to x, 0
does not grow. "beyond a fixed cost": s of time = a + b * x^s over all values,
with a, b >= 0 and the least relative squares; what is cheaper where it is small
(experts that share products, rows that stay in the cache) makes it larger. For
ranks (gloo processes of this machine, all with the base's tokens) only what
each hands to collectives is counted: processes that share cores say nothing
about time.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from _count import Work
from _report import machine, span, versions
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]

from equipoise import AuxLoss, Balancer, ExpertBias, MoE

WIDTH, HIDDEN = 64, 64
AXES = {
    "tokens": (512, 1024, 2048, 4096, 8192, 16384),
    "experts": (8, 16, 32, 64, 128, 256),
    "top_k": (1, 2, 4, 8),
    "layers": (1, 2, 4, 8, 16),
}
RANKS = (1, 2, 4)
STEEPEST = 1.05


@dataclass(frozen=True)
class Size:
    tokens: int = 2048
    experts: int = 16
    top_k: int = 2
    layers: int = 4


class Stack:
    """A model with its balancer and optimizer; calling it is one training step."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.size = size
        self.layers = nn.ModuleList(MoE(WIDTH, HIDDEN, size.experts, size.top_k) for _ in range(size.layers))
        self.optimizer = torch.optim.SGD(self.layers.parameters(), lr=0.0)
        policies = [AuxLoss("global_batch", coef=1e-2), ExpertBias("proportional")]
        self.balancer = Balancer(self.layers, policies, optimizer=self.optimizer)

    def __call__(self) -> None:
        x_TD: Tensor = torch.randn(self.size.tokens, WIDTH, requires_grad=True)
        for layer in self.layers:
            x_TD = x_TD + layer(F.rms_norm(x_TD, (WIDTH,)))
        self.balancer.tap(x_TD.square().mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.balancer.metrics()  # waits for the step's sum

    def counted(self) -> Work:
        """What a step does once everything is made."""
        self()
        self()
        with Work() as work:
            self()
        return work


def grow(axis: str, values: Sequence[int], rounds: int) -> list[tuple[list[float], Work]]:
    """(milliseconds of each round, counted work) at each value of an axis, the others as in the base."""
    stacks = [Stack(replace(Size(), **{axis: value})) for value in values]
    counted = [stack.counted() for stack in stacks]
    times: list[list[float]] = [[] for _ in stacks]
    for _ in range(rounds):
        for stack, took in zip(stacks, times, strict=True):
            start = time.process_time()
            stack()
            took.append(1e3 * (time.process_time() - start))
    return list(zip(times, counted, strict=True))


def slope(x: Sequence[int], y: Sequence[float]) -> float:
    """s of y ~ x^s between the last value and the third from the end.

    >>> slope([1, 2, 4, 8], [9.0, 10.0, 20.0, 40.0])
    1.0
    """
    return round(math.log(y[-1] / y[-3]) / math.log(x[-1] / x[-3]), 2)


def exponent(x: Sequence[int], y: Sequence[float]) -> float:
    """s of y = a + b * x^s with a, b >= 0; 0 where y changes by less than a tenth.

    >>> exponent([1, 2, 4, 8], [7.0, 9.0, 13.0, 21.0]), exponent([1, 2, 4], [5.0, 5.1, 5.0])
    (1.0, 0.0)
    """
    wide, high = np.array(x, dtype=float), np.array(y, dtype=float)
    if high.max() < 1.1 * high.min():
        return 0.0
    found = []
    for s in np.arange(0.05, 2.5, 0.01):
        rows = np.stack([1 / high, wide**s / wide[0] ** s / high], axis=1)
        (a, b), *_ = np.linalg.lstsq(rows, np.ones(len(high)), rcond=None)
        if a < 0:
            a, b = 0.0, float(rows[:, 1].sum() / (rows[:, 1] ** 2).sum())
        found.append((float(((rows @ [a, b] - 1) ** 2).sum()), float(s)))
    return round(min(found)[1], 2)


# ---------------------------------------------------------------- ranks


def join(rank: int, size: int, port: int, pipe: Connection) -> None:
    """A rank: one counted step; sends (its collectives' bytes, bytes touched)."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    work = Stack(Size()).counted()
    pipe.send((work.sums, work.touched))
    dist.destroy_process_group()


def on_ranks(size: int) -> tuple[list[int], int]:
    """(bytes of each collective of a step, bytes touched) of the rank that does most."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(size):
        pipe, end = context.Pipe()
        processes.append(context.Process(target=join, args=(rank, size, store.port, end), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    answers = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join(30)
    return max(answers, key=lambda answer: sum(answer[0]))


# ---------------------------------------------------------------- the figure

COLOURS = {"tokens": "#0b4f6c", "experts": "#d1495b", "top_k": "#2e933c", "layers": "#edae49", "ranks": "#7a5195"}
PANEL, LEFT, TOP, BETWEEN, REACH = 300, 46, 40, 74, 6  # pixels; both axes go up to 2^REACH


def figure(panels: dict[str, dict[str, tuple[Sequence[int], Sequence[float]]]]) -> str:
    """One log-log panel each: how often as much, against how often as much of the axis."""
    width, height = LEFT + len(panels) * (PANEL + BETWEEN), TOP + PANEL + 50
    style = 'font-family="sans-serif" font-size="12" fill="#1f2933"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {style}>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for number, (title, curves) in enumerate(panels.items()):
        lines += _panel(LEFT + number * (PANEL + BETWEEN), title, curves)
    return "\n".join([*lines, "</svg>", ""])


def _panel(left: int, title: str, curves: dict[str, tuple[Sequence[int], Sequence[float]]]) -> list[str]:
    def place(x: float, y: float) -> str:
        return f"{left + PANEL * np.log2(x) / REACH:.1f},{TOP + PANEL - PANEL * np.log2(y) / REACH:.1f}"

    lines = [f'<text x="{left}" y="{TOP - 16}" font-size="14" font-weight="bold">{escape(title)}</text>']
    for power in range(REACH + 1):
        (x, y), said = place(2**power, 2**power).split(","), f"{2**power}x"
        lines.append(f'<path d="M{x},{TOP}V{TOP + PANEL}M{left},{y}H{left + PANEL}" stroke="#e4e7eb" fill="none"/>')
        lines.append(f'<text x="{x}" y="{TOP + PANEL + 18}" text-anchor="middle">{said}</text>')
        lines.append(f'<text x="{left - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{said}</text>')
    ends = f"M{place(1, 1)}L{place(2**REACH, 2**REACH)}"
    lines.append(f'<path d="{ends}" stroke="#9aa5b1" stroke-dasharray="5 4" fill="none"/>')
    for row, (axis, (x, y)) in enumerate(curves.items()):
        colour, dots = COLOURS[axis], [place(a / x[0], b / y[0]) for a, b in zip(x, y, strict=True)]
        lines.append(f'<path d="M{"L".join(dots)}" stroke="{colour}" stroke-width="2" fill="none"/>')
        lines += ['<circle cx="{}" cy="{}" r="3" fill="{}"/>'.format(*dot.split(","), colour) for dot in dots]
        said = f"{axis.replace('top_k', 'K')} {x[0]}–{x[-1]}: slope {slope(x, y):.2f}"
        lines.append(f'<text x="{left + 12}" y="{TOP + 20 + 17 * row}" fill="{colour}">{said}</text>')
    lines.append(f'<text x="{left + PANEL / 2}" y="{TOP + PANEL + 38}" text-anchor="middle">times as much</text>')
    return lines


# ---------------------------------------------------------------- the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--svg", type=Path, help="where to write the figure")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{machine()}; {versions('torch')}; one thread, {arguments.rounds} rounds")
    print(f"base: {Size()}, width {WIDTH}, expert width {HIDDEN}\n")
    print(f"{'axis':>8} {'value':>6} {'ms':>18} {'operations':>11} {'MB touched':>11}")
    spent: dict[str, tuple] = {}
    touched: dict[str, tuple] = {}
    for axis, values in AXES.items():
        found = grow(axis, values, arguments.rounds)
        for value, (took, work) in zip(values, found, strict=True):
            print(f"{axis:>8} {value:6} {span(took):>18} {work.total:11} {work.touched / 1e6:11.1f}")
        spent[axis] = values, [statistics.median(took) for took, _ in found]
        touched[axis] = values, [work.touched for _, work in found]
        ms, mb = (f"{slope(*each):.2f} ({exponent(*each):.2f})" for each in (spent[axis], touched[axis]))
        steep = max(slope(*spent[axis]), slope(*touched[axis])) > STEEPEST
        print(f"{'':>8} slope (beyond a fixed cost): ms {ms}, MB {mb}{' <- too steep' * steep}\n")
    print(f"{'axis':>8} {'value':>6} {'sums a step':>12} {'bytes a rank':>13} {'MB touched':>11}")
    answers = [on_ranks(size) for size in RANKS]
    for size, (sums, work) in zip(RANKS, answers, strict=True):
        print(f"{'ranks':>8} {size:6} {len(sums):12} {sum(sums):13} {work / 1e6:11.1f}")
    touched["ranks"] = RANKS, [work for _, work in answers]
    if arguments.svg:
        arguments.svg.write_text(figure({"CPU time of a step": spent, "bytes it touches": touched}), encoding="utf-8")


if __name__ == "__main__":
    main()
