"""Times the contestants at one point: in turn, each in a process of its own, refusing what computes something else."""

from __future__ import annotations

import multiprocessing
import random
import time
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from _contestants import CONTESTANTS, PEERS, Point, build, draw, refusal
from _report import pairs, quartiles

__all__ = ["everybody", "measure", "present"]

CHECKED = 64  # tokens of the comparison before the contest
DIFFERENCE = {"fp32": 1e-4, "bf16": 0.05, "mixed": 0.05}
PATIENCE, LEAST = 10, 1.0  # a first call longer than 10x the best, and than a second, ends a contestant
WARM_UP, TURN_MS = 8, 25  # rounds; what a turn lasts at least, in calls of ours


def serve(pipe: Connection, name: str, point: Point) -> None:
    """A contestant's process: first its answers, then milliseconds per forward + backward each time it is asked."""
    torch.set_num_threads(point.threads)
    clock = time.process_time if point.threads == 1 else time.perf_counter
    layer: Any = build(name, point)
    torch.manual_seed(1)
    pipe.send(answers(layer, draw(point, CHECKED)))
    if name == "ours":
        with torch.no_grad():
            counts_E = layer.gate(draw(point)).counts_E
        pipe.send(float(counts_E.max() / counts_E.float().mean()) - 1)
    torch.manual_seed(2)  # the same tokens for everybody, round by round
    while calls := pipe.recv():
        took = 0.0
        for _ in range(calls):
            x_TD = draw(point).requires_grad_()
            dy_TD = torch.randn_like(x_TD)
            start = clock()
            layer(x_TD).backward(dy_TD)
            took += clock() - start
            layer.zero_grad()
        pipe.send(1e3 * took / calls)


def answers(layer: Any, x_TD: torch.Tensor) -> list[np.ndarray]:
    """Output and gradient of the tokens."""
    y_TD = layer(x_TD.requires_grad_())
    y_TD.backward(torch.ones_like(y_TD))
    layer.zero_grad()
    return [y_TD.detach().float().numpy(), x_TD.grad.float().numpy()]  # type: ignore[union-attr]


def check(name: str, theirs: list[np.ndarray], ours: list[np.ndarray], dtype: str) -> None:
    """Ends it all if a contestant computes something else.

    Token by token, because a router whose logits are bfloat16 chooses other experts for some: the median must agree.
    """
    for what, a, b in zip(("outputs", "gradients"), theirs, ours, strict=True):
        difference = float(np.median(np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)))
        if not difference <= DIFFERENCE[dtype]:
            raise SystemExit(
                f"{name}: the {what} differ from ours by {difference:.1%}: a comparison would mean nothing"
            )


class Contest:
    """The processes at one point. All are gone when the `with` block ends."""

    def __init__(self, point: Point) -> None:
        # Forked from a process that has never computed: they start at once and own nothing but the imports.
        self.point, self.context = point, multiprocessing.get_context("fork")
        self.pipes: dict[str, Connection] = {}
        self.processes: dict[str, Any] = {}

    def __enter__(self) -> Contest:
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.pipes):
            self.drop(name)

    def start(self, name: str) -> None:
        self.pipes[name], end = self.context.Pipe()
        self.processes[name] = self.context.Process(target=serve, args=(end, name, self.point), daemon=True)
        self.processes[name].start()
        end.close()  # so that nobody but the process holds it, and its death is heard

    def drop(self, name: str) -> None:
        self.pipes.pop(name).close()
        self.processes[name].kill()
        self.processes[name].join()

    def hear(self, name: str, seconds: float) -> Any:
        """Its next message, None after so many seconds without one."""
        if not self.pipes[name].poll(seconds):
            return None
        try:
            return self.pipes[name].recv()
        except (EOFError, ConnectionError):
            raise SystemExit(f"{name}: its process died at {self.point}; it may have said why above") from None

    def turn(self, name: str, calls: int = 1, seconds: float = 600) -> float | None:
        self.pipes[name].send(calls)
        return self.hear(name, seconds)


def measure(point: Point, rounds: int, budget: float = float("inf")) -> dict[str, Any]:
    """Milliseconds of every contestant at a point, in about ``budget`` seconds (at least 5 rounds, at most ``rounds``).

    Returns ``ms`` (name -> lower quartile, median, upper quartile), ``ratio`` (peer -> quartiles of its time over ours
    inside each round), ``skipped`` (name -> why), ``best`` (the peer with the least median), ``maxvio``, ``rounds``.
    """
    began = time.monotonic()
    skipped = {name: why for name in CONTESTANTS if (why := refusal(name, point))}
    order = random.Random(0)
    with Contest(point) as contest:
        maxvio, first = _first_calls(contest, point, skipped)
        calls = max(1, min(16, round(TURN_MS / first["ours"])))
        times: dict[str, list[float]] = {name: [] for name in contest.pipes}
        done = -WARM_UP  # the first rounds pay for kernels and memory that later ones find ready
        while done < rounds:
            spent = (time.monotonic() - began) / budget
            if done < 0 and spent > 0.3:
                done = 0  # a slow point warms up less
            if done >= 5 and spent > 1:
                break
            for name in order.sample(list(contest.pipes), len(contest.pipes)):
                took = contest.turn(name, calls)
                if done >= 0 and took is not None:
                    times[name].append(took)
            done += 1
    peers = {name: pairs(times[name], times["ours"]) for name in PEERS if name in times}
    if not peers:
        reasons = ", ".join(f"{name}: {why}" for name, why in skipped.items())
        raise SystemExit(
            f"expected a peer that takes part at {point}\n  got: {reasons}"
            "\n  do:  run it again while the machine does nothing else: first calls were slow"
        )
    return {
        "point": asdict(point),
        "maxvio": round(maxvio, 3),
        "rounds": done,
        "best": min(peers, key=lambda name: quartiles(times[name])[1]),
        "ms": {name: [round(value, 4) for value in quartiles(took)] for name, took in times.items()},
        "ratio": {name: [round(value, 4) for value in quartiles(each)] for name, each in peers.items()},
        "skipped": skipped,
    }


def _first_calls(contest: Contest, point: Point, skipped: dict[str, str]) -> tuple[float, dict[str, float]]:
    """(MaxVio, first milliseconds by name): starts and checks everybody, and drops who is slower than patience."""
    first: dict[str, float] = {}
    ours: list[np.ndarray] = []
    maxvio = 0.0
    for name in CONTESTANTS:
        if name in skipped:
            continue
        contest.start(name)
        limit = 600 if name == "ours" else max(LEAST, PATIENCE * min(first.values()) / 1e3)
        given = contest.hear(name, 60 + limit)
        if name == "ours":
            ours, maxvio = given, contest.hear(name, 60)
        elif name != "dense" and given is not None:
            check(name, given, ours, point.dtype)
        took = None
        for _ in range(2 if given is not None else 0):  # the first call pays for what later ones find ready
            took = contest.turn(name, 1, limit)
            if took is None:
                break
        if took is None:
            contest.drop(name)
            skipped[name] = f"longer than {1e3 * limit:.0f} ms"
        else:
            first[name] = took
    return maxvio, first


def present(found: dict[str, Any]) -> str:
    """A line of the table."""
    point, ms, best = Point(**found["point"]), found["ms"], found["best"]
    low, middle, high = found["ratio"][best]
    dense = f"{ms['dense'][1]:.3g}" if ms["dense"][1] < 1000 else f"{ms['dense'][1]:.0f}"
    return (
        f"{point.size:>19} {point.skew:4.3g} {point.threads:3} {point.dtype:>5} {found['maxvio']:6.2f} "
        f"{_ms(ms['ours']):>16} {best:>10} {ms[best][1]:7.4g} {f'{middle:.2f}x {low:.2f}-{high:.2f}':>15} {dense:>6}"
    )


def _ms(given: list[float]) -> str:
    low, middle, high = given
    return f"{middle:.4g} {low:.3g}-{high:.3g}" if middle < 1000 else f"{middle:.0f} {low:.0f}-{high:.0f}"


def everybody(found: list[dict[str, Any]]) -> str:
    """A table of all medians; a dash where a contestant did not take part."""
    lines = [f"{'T,D,H,E,K':>19} skew thr dtype " + " ".join(f"{name:>10}" for name in CONTESTANTS)]
    for each in found:
        point = Point(**each["point"])
        cells = [f"{each['ms'][name][1]:.4g}" if name in each["ms"] else "-" for name in CONTESTANTS]
        said = f"{point.size:>19} {point.skew:4.3g} {point.threads:3} {point.dtype:>5} "
        lines.append(said + " ".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
