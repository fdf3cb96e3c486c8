"""Times the MoE layer, forward + backward, against `F.grouped_mm` behind the same router and against a dense SwiGLU.

    python benchmarks/moe_layer.py                       # the three sizes of the README, bfloat16, one thread
    python benchmarks/moe_layer.py --dtype all --size 1024,128,128,16,2

Every call gets new tokens, so that expert loads, and with them the shapes of all products, are new as in training:
tokens come in sequences of 256 whose words share a direction, as text of one domain does (``--spread 0``: independent
tokens, nearly even loads). The contestants take turns, each in a process of its own: the kernels and the memory that
one has made ready must neither serve another nor push its own out. `grouped_mm` is the better of two ways to combine:
weighted `index_add_`, and un-sort + sum. `dense` is one SwiGLU with the FLOPs of the K active experts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor

from equipoise.layers.moe import MoE, SwiGLU

SIZES = ["8192,128,128,16,2", "8192,256,128,64,8", "2048,512,256,32,4"]
DTYPES = {  # name: (tokens, weights)
    "bf16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
    "fp32": (torch.float32, torch.float32),
}
CONTESTANTS = ["ours", "index_add", "unsort", "dense"]
SEQUENCE, WARM_UP = 256, 8
Contestant = Callable[[Tensor], Tensor]


def grouped(layer: MoE, x_TD: Tensor, *, combine: str) -> Tensor:
    """The same layer as one would write it with ``F.grouped_mm``."""
    routing = layer.gate(x_TD)
    weights_TK, ids_TK = routing.weights_TK.to(x_TD.dtype), routing.expert_ids_TK
    gate_up_EFD, down_EDH = layer.experts.gate_up_proj.to(x_TD.dtype), layer.experts.down_proj.to(x_TD.dtype)
    order_N = ids_TK.flatten().argsort(stable=True)
    ends_E = torch.bincount(ids_TK.flatten(), minlength=len(gate_up_EFD)).cumsum(0).int()
    tokens_N = order_N // ids_TK.shape[1]
    gate, up = F.grouped_mm(x_TD[tokens_N], gate_up_EFD.mT, offs=ends_E).chunk(2, dim=-1)
    out_ND = F.grouped_mm(F.silu(gate) * up, down_EDH.mT, offs=ends_E)
    if combine == "index_add":
        weighted_ND = out_ND * weights_TK.flatten()[order_N].unsqueeze(1)
        return torch.zeros_like(x_TD).index_add_(0, tokens_N, weighted_ND)
    rows_N = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N)))
    return (out_ND[rows_N].unflatten(0, ids_TK.shape) * weights_TK.unsqueeze(-1)).sum(1)


def draw(tokens: int, dim: int, spread: float, dtype: torch.dtype) -> Tensor:
    """Unit-variance tokens; the words of a sequence share a direction that holds ``spread`` of the variance."""
    shared = torch.randn(-(-tokens // SEQUENCE), 1, dim).expand(-1, SEQUENCE, -1).reshape(-1, dim)[:tokens]
    return (torch.randn(tokens, dim) * (1 - spread) ** 0.5 + shared * spread**0.5).to(dtype)


def build(size: str, dtype: str) -> tuple[MoE, dict[str, Contestant]]:
    _, dim, hidden, num_experts, top_k = map(int, size.split(","))
    torch.manual_seed(0)
    layer = MoE(dim, hidden, num_experts, top_k).to(DTYPES[dtype][1])
    return layer, {
        "ours": layer,
        "index_add": lambda x_TD: grouped(layer, x_TD, combine="index_add"),
        "unsort": lambda x_TD: grouped(layer, x_TD, combine="unsort"),
        "dense": SwiGLU(dim, hidden * top_k).to(DTYPES[dtype][0]),
    }


def contest(pipe: Connection, name: str, size: str, dtype: str, spread: float, threads: int) -> None:
    """A contestant's process: milliseconds of one forward + backward each time it is asked."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    layer, contestants = build(size, dtype)
    tokens, dim = map(int, size.split(",")[:2])
    while pipe.recv():
        x_TD = draw(tokens, dim, spread, DTYPES[dtype][0]).requires_grad_()
        dy_TD = torch.randn_like(x_TD)
        start = clock()
        contestants[name](x_TD).backward(dy_TD)
        stop = clock()
        layer.zero_grad()
        pipe.send(1e3 * (stop - start))


def check(size: str, dtype: str, spread: float) -> float:
    """Refuses to compare what computes different things; returns the load, MaxVio."""
    layer, contestants = build(size, dtype)
    tokens, dim = map(int, size.split(",")[:2])
    x_TD = draw(tokens, dim, spread, DTYPES[dtype][0])
    with torch.no_grad():
        ours, *theirs = (contestants[name](x_TD).float() for name in ("ours", "index_add", "unsort"))
        counts_E = layer.gate(x_TD).counts_E
    for y_TD in theirs:
        if (difference := float((ours - y_TD).norm() / y_TD.norm())) > 0.02:
            raise SystemExit(f"the outputs differ by {difference:.1%}: this comparison would mean nothing")
    return float(counts_E.max() / counts_E.float().mean()) - 1


def measure(size: str, dtype: str, rounds: int, spread: float, threads: int) -> None:
    maxvio = check(size, dtype, spread)
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    for name in CONTESTANTS:
        pipes[name], end = context.Pipe()
        context.Process(target=contest, args=(end, name, size, dtype, spread, threads), daemon=True).start()
    times: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    for index in range(rounds + WARM_UP):
        for name, pipe in pipes.items():
            pipe.send(True)
            took = pipe.recv()
            if index >= WARM_UP:  # the first rounds pay for kernels and memory that later ones find ready
                times[name].append(took)
    for pipe in pipes.values():
        pipe.send(False)
    peer = min(("index_add", "unsort"), key=lambda name: statistics.median(times[name]))
    print(
        f"{size:>18} {dtype:>5} {maxvio:6.2f} {span(times['ours'])} {span(times[peer])} "
        f"{ratio(times[peer], times['ours'])} {statistics.median(times['dense']):6.0f}",
        flush=True,
    )


def span(values: list[float]) -> str:
    low, _, high = statistics.quantiles(values, n=4)
    return f"{statistics.median(values):5.0f} {f'{low:.0f}-{high:.0f}':>7}"


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Median and quartiles of the ratio inside each round: what slows the whole machine down falls out."""
    low, median, high = statistics.quantiles([a / b for a, b in zip(theirs, ours, strict=True)], n=4)
    return f"{median:5.2f}x {low:.2f}-{high:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", action="append", metavar="T,D,H,E,K", help="tokens, width, expert width, experts, K")
    parser.add_argument("--dtype", default="bf16", choices=[*DTYPES, "all"], help="mixed: bf16 tokens, fp32 weights")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--spread", type=float, default=0.3, help="share of variance that a sequence's tokens share")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kind = "CPU time (neighbours do not count)" if arguments.threads == 1 else "wall time"
    print(
        f"{processor()}, {arguments.threads} thread(s), torch {torch.__version__}, Python {platform.python_version()}"
    )
    print(f"{arguments.rounds} rounds, {kind}; milliseconds: median, quartiles\n")
    print(f"{'T,D,H,E,K':>18} {'dtype':>5} MaxVio {'ours':>13} {'grouped_mm':>13} {'ratio':>16} {'dense':>6}")
    for dtype in DTYPES if arguments.dtype == "all" else [arguments.dtype]:
        for size in arguments.size or SIZES:
            measure(size, dtype, arguments.rounds, arguments.spread, arguments.threads)


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
