"""What balancing costs: the step's sum over ranks, memory, and its losses' time.

    python benchmarks/balance_cost.py             # all three, about two minutes
    python benchmarks/balance_cost.py collective --latency 20 --bandwidth 12.5
    python benchmarks/balance_cost.py memory
    python benchmarks/balance_cost.py loss --tokens 8192 --layers 24 --rounds 9

collective: how often a step communicates and how many bytes (counted, for
    models of several sizes), what that takes on 2 to 8 processes of this
    machine (gloo, measured), fits of time = a + b * bytes + c * log2(ranks),
    or c * ranks, and a model of a cluster up to 16384 ranks. The fits are of
    this machine, whose processes share its cores; the cluster is computed from
    --latency, --hop, --bandwidth and --per-node. Their defaults: a tree of
    nodes, 14 us to begin and 8.5 us a hop (what NCCL's own tuner assumes for
    its LL128 protocol, src/graph/tuning.cc), 400 Gb/s a node, and every byte
    goes up the tree and down again.
memory: bytes of all tensors that a balancer owns, for layers L and experts E
    (expected: proportional to L * E, whatever the tokens), and what routers
    with a balancer keep alive at most beyond the same without.
loss: counting, loss and gradient against transformers' function
    `load_balancing_loss_func`, one thread, CPU time, contestants in turn.
    "from logits": softmax, top-k, counts, loss, gradient. "logits and ids": the
    same from what a router returns, its choices among it; transformers'
    function makes them a second time. "has p and ids": what is added to a
    router that computed both for its own use; transformers' function takes
    logits only, so its cost is the same. "in training": forward, backward and
    step of routers with a Balancer minus that without.
"""

from __future__ import annotations

import argparse
import gc
import math
import multiprocessing
import os
import platform
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from equipoise import AuxLoss, Balancer, ExpertBias
from equipoise.collectives import Group, Ranks
from equipoise.functional import balance_loss, gate_probs, route
from equipoise.layers import Router

MODELS = [(24, 64), (48, 128), (94, 128), (61, 256)]  # layers, experts: small, Qwen3-30B, Qwen3-235B, DeepSeek-V3 + MTP
CLUSTER = [8, 64, 512, 4096, 16384]
DIM = 16


class Counted(Group):
    """This process alone, with a list of what it was asked to sum."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: list[int] = []

    def start_sum(self, tensor: Tensor) -> Callable[[], Tensor]:
        self.sums.append(tensor.numel() * tensor.element_size())
        return super().start_sum(tensor)


def build(layers: int, experts: int, top_k: int = 2, *, normalize: bool = True) -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(Router(DIM, experts, top_k, normalize=normalize) for _ in range(layers))


def forward(routers: nn.ModuleList, x_TD: Tensor) -> Tensor:
    return torch.stack([router(x_TD).weights_TK.square().sum() for router in routers]).sum()


def step(routers: nn.ModuleList, balancer: Balancer, tokens: int, micro_batches: int = 1) -> None:
    optimizer = torch.optim.SGD(routers.parameters(), lr=0.0)
    for _ in range(micro_batches):
        (balancer.tap(forward(routers, torch.randn(tokens, DIM))) / micro_batches).backward()
    optimizer.step()
    balancer.metrics()  # waits for the step's sum


def counted_sums(layers: int, experts: int, estimator: str = "previous", micro_batches: int = 4) -> list[int]:
    """Bytes of every sum that one optimizer step starts, in order."""
    group, routers = Counted(), build(layers, experts)
    balancer = Balancer(routers, [AuxLoss(coef=1e-2, estimator=estimator)], ranks=Ranks(group))
    step(routers, balancer, tokens=8, micro_batches=micro_batches)
    return group.sums


# ---------------------------------------------------------------- the step's sum over ranks


def serve(rank: int, size: int, port: int, pipe: Connection) -> None:
    """One of the processes that sum: answers with seconds per sum for every (number of ranks, bytes) asked."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    store = TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    groups = {n: cast(dist.ProcessGroup, dist.new_group(list(range(n)))) for n in range(2, size + 1)}
    while (asked := pipe.recv()) is not None:
        ranks, number, repeats = asked
        took = []
        if rank < ranks:
            group, flat = Group(groups[ranks]), torch.ones(number // 8, dtype=torch.float64)
            for _ in range(repeats + 3):
                dist.barrier(groups[ranks])
                start = time.perf_counter()
                group.sum(flat)
                took.append(time.perf_counter() - start)
        pipe.send(took[3:])
    dist.destroy_process_group()


def measure_sums(sizes: list[int], most: int, repeats: int) -> dict[tuple[int, int], list[float]]:
    """(ranks, bytes) -> microseconds of each repeat, the slowest rank's."""
    context = multiprocessing.get_context("spawn")
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(most):
        pipe, end = context.Pipe()
        processes.append(context.Process(target=serve, args=(rank, most, store.port, end), daemon=True))
        processes[-1].start()
        pipes.append(pipe)
    found = {}
    for ranks in [n for n in (2, 4, 6, 8) if n <= most]:
        for number in sizes:
            for pipe in pipes:
                pipe.send((ranks, number, repeats))
            answers = [took for pipe in pipes if (took := pipe.recv())]
            found[ranks, number] = [1e6 * max(each) for each in zip(*answers, strict=True)]
    for pipe in pipes:
        pipe.send(None)
    for process in processes:
        process.join(10)
    return found


def fit(found: dict[tuple[int, int], list[float]], term: Callable[[int], float]) -> tuple[np.ndarray, float]:
    """(a, b, c) of a + b * bytes + c * term(ranks) in microseconds, and the share of variance it explains."""
    rows = np.array([[1.0, number, term(ranks)] for ranks, number in found])
    times = np.array([statistics.median(took) for took in found.values()])
    weight = 1 / times[:, None]  # relative errors count, or the largest would be all that is fitted
    abc, *_ = np.linalg.lstsq(rows * weight, times * weight[:, 0], rcond=None)
    left = times - rows @ abc
    return abc, float(1 - (left**2).sum() / ((times - times.mean()) ** 2).sum())


def cluster(number: int, ranks: int, per_node: int, latency: float, hop: float, bandwidth: float) -> float:
    """Microseconds of a sum of so many bytes up a binary tree of nodes and down again; 1.2 us a hop inside a node."""
    nodes = max(1, -(-ranks // per_node))
    inside = min(ranks, per_node) - 1
    hops = 2 * (inside * 1.2 + math.ceil(math.log2(nodes)) * hop)
    return latency + hops + 2 * number / (bandwidth * 1e3)  # GB/s = 1e3 bytes a microsecond


def show_collective(arguments: argparse.Namespace) -> None:
    print("Sums of one optimizer step, 4 micro-batches (counted; KiB of all sums together)\n")
    print(f"{'layers x experts':>18} {'previous':>12} {'prefix':>14} {'bias only':>12} {'bytes / (L E)':>14}")
    sizes = []
    for layers, experts in MODELS:
        steady, prefix = (counted_sums(layers, experts, name) for name in ("previous", "prefix"))
        group, routers = Counted(), build(layers, experts)
        step(routers, Balancer(routers, [ExpertBias("proportional")], ranks=Ranks(group)), 8, 4)
        cells = [f"{len(sums)} x {sum(sums) / 1024:.0f}" for sums in (steady, prefix, group.sums)]
        print(f"{f'{layers} x {experts}':>18} {cells[0]:>12} {cells[1]:>14} {cells[2]:>12}", end=" ")
        print(f"{sum(steady) / layers / experts:14.1f}")
        sizes.append(sum(steady))
    print(f"\nMicroseconds of one such sum on this machine, gloo, {os.cpu_count()} cores: median (quartiles)\n")
    found = measure_sums([64, *sizes], arguments.ranks, arguments.repeats)
    counts = sorted({ranks for ranks, _ in found})
    print(f"{'bytes':>9} " + " ".join(f"{f'{n} ranks':>16}" for n in counts))
    for number in [64, *sizes]:
        print(f"{number:9} " + " ".join(f"{span(found[n, number]):>16}" for n in counts))
    print()
    for name, term in (("log2(ranks)", math.log2), ("ranks", float)):
        (a, b, c), explained = fit(found, term)
        print(f"fit: {a:.0f} us + {1e3 * b:.2f} us per kB + {c:.0f} us * {name}; R2 {explained:.2f}")
    if (os.cpu_count() or 1) < max(counts):
        print(f"More processes than the {os.cpu_count()} cores wait for a core: the last term is theirs.")
    print(
        f"\nA cluster, computed: {arguments.latency:g} us + {arguments.hop:g} us a hop, "
        f"{arguments.bandwidth:g} GB/s a node of {arguments.per_node}.\n"
        "Milliseconds of the step's one sum; in brackets one sum of E floats for each\n"
        "layer and each of 4 micro-batches, one after the other\n"
    )
    print(f"{'layers x experts':>18} " + " ".join(f"{n:>11}" for n in CLUSTER))
    for (layers, experts), number in zip(MODELS, sizes, strict=True):
        cells = []
        for ranks in CLUSTER:
            network = (ranks, arguments.per_node, arguments.latency, arguments.hop, arguments.bandwidth)
            apart = 4 * layers * cluster(4 * experts, *network)
            cells.append(f"{cluster(number, *network) / 1e3:.2f} ({apart / 1e3:.0f})")
        print(f"{f'{layers} x {experts}':>18} " + " ".join(f"{cell:>11}" for cell in cells))


# ---------------------------------------------------------------- memory


def tensors_of(balancer: Balancer) -> Iterator[Tensor]:
    """Every tensor that can be reached from a balancer without passing through the model: meters, sums, histories."""
    seen: set[int] = set()
    stack: list[Any] = [balancer]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or isinstance(thing, nn.Module | type) or callable(thing):
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
            stack += [] if thing.grad is None else [thing.grad]
        elif isinstance(thing, dict):
            stack += list(thing.values())
        elif isinstance(thing, list | tuple | set):
            stack += list(thing)
        elif hasattr(thing, "__dict__"):
            stack += list(vars(thing).values())


def owned_bytes(layers: int, experts: int, tokens: int, policies: list | None = None, steps: int = 2) -> int:
    """Bytes of the storages that a balancer holds between steps."""
    routers = build(layers, experts)
    balancer = Balancer(routers, policies or [AuxLoss(coef=1e-2, estimator="ema"), ExpertBias("proportional")])
    for _ in range(steps):
        step(routers, balancer, tokens)
    parameters = {p.untyped_storage().data_ptr() for p in (*routers.parameters(), *routers.buffers())}
    storages = {}
    for tensor in tensors_of(balancer):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Live(TorchDispatchMode):
    """Bytes of all tensors that are alive, each storage once: what was made since, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[weakref.ref] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.watch(tensor.untyped_storage())
        return result

    def watch(self, storage: torch.UntypedStorage) -> None:
        number = storage.nbytes()
        gone = weakref.ref(storage, lambda one: self.forget(one, number))
        if gone not in self.known:
            self.known.add(gone)
            self.now += number
            self.most = max(self.most, self.now)

    def forget(self, one: weakref.ref, number: int) -> None:
        self.known.discard(one)
        self.now -= number


def live_bytes(layers: int, experts: int, tokens: int, policies: list, *, recompute: bool = False) -> tuple[int, int]:
    """(alive after forward, the most at any time) in a forward and backward; no policies: without a balancer."""
    routers, live = build(layers, experts), Live()
    balancer = Balancer(routers, policies, gradient_norms=False) if policies else None
    x_TD = torch.randn(tokens, DIM, requires_grad=True)

    def run(router: nn.Module, x_TD: Tensor) -> Tensor:
        return router(x_TD).weights_TK.square().sum()

    def checkpointed(router: nn.Module, x_TD: Tensor) -> Tensor:
        return checkpoint(run, router, x_TD, use_reentrant=False)

    with live:
        loss = torch.stack([(checkpointed if recompute else run)(router, x_TD) for router in routers]).sum()
        loss = balancer.tap(loss) if balancer else loss
        gc.collect()
        held = live.now
        loss.backward()
    return held, live.most


def extra_bytes(experts: int, tokens: int, policies: list, *, recompute: bool) -> tuple[float, float]:
    """What a balancer adds to the most that is alive: (bytes for each layer and token, bytes for each token once)."""
    added = {}
    for layers in (4, 12):
        plain = live_bytes(layers, experts, tokens, [], recompute=recompute)[1]
        added[layers] = live_bytes(layers, experts, tokens, policies, recompute=recompute)[1] - plain
    slope = (added[12] - added[4]) / 8
    return slope / tokens, (added[4] - 4 * slope) / tokens


def show_memory(arguments: argparse.Namespace) -> None:
    print("Bytes that a balancer owns between steps: an `ema` loss, a bias and all metrics\n")
    print(f"{'layers':>8} {'experts':>8} {'tokens':>8} {'bytes':>10} {'/ (L E)':>8}")
    for layers, experts, tokens in [(4, 64, 64), (4, 64, 1024), (16, 64, 64), (4, 256, 64), (61, 256, 64)]:
        number = owned_bytes(layers, experts, tokens)
        print(f"{layers:8} {experts:8} {tokens:8} {number:10} {number / layers / experts:8.0f}")
    print("\nWhat a balancer adds to the most memory that is alive in a forward and backward:\n")
    print(f"{'losses':>16} {'recompute':>10} {'experts':>8} {'bytes / layer and token':>24} {'/ token, once':>14}")
    named = {
        "global_batch": [AuxLoss(coef=1e-2, estimator="previous")],
        "sequence": [AuxLoss("sequence", coef=1e-2)],
        "bias only": [ExpertBias("proportional")],
    }
    for name, policies in named.items():
        for experts, recompute in [(16, False), (64, False), (64, True)]:
            per_layer, once = extra_bytes(experts, arguments.tokens // 4, policies, recompute=recompute)
            print(f"{name:>16} {'yes' if recompute else 'no':>10} {experts:8} {per_layer:24.1f} {once:14.1f}")


# ---------------------------------------------------------------- losses against transformers


def contestants(tokens: int, layers: int, experts: int, top_k: int) -> dict[str, Callable[[], object]]:
    """Every contestant computes the gradients of all layers, from the same logits."""
    from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

    torch.manual_seed(0)
    logits = [torch.randn(tokens, experts, requires_grad=True) for _ in range(layers)]
    probs = [z.detach().softmax(dim=-1).requires_grad_() for z in logits]
    ids = [p.detach().topk(top_k).indices for p in probs]

    def theirs() -> None:
        load_balancing_loss_func(tuple(logits), experts, top_k).backward()  # type: ignore[union-attr]

    def from_logits() -> None:
        losses = [balance_loss(gate_probs(z), route(z.detach(), top_k).expert_ids_TK) for z in logits]
        torch.stack(losses).sum().backward()

    def router_output() -> None:
        torch.stack([balance_loss(gate_probs(z), i) for z, i in zip(logits, ids, strict=True)]).sum().backward()

    def has_p_and_ids() -> None:
        torch.stack([balance_loss(p, i) for p, i in zip(probs, ids, strict=True)]).sum().backward()

    def clear(run: Callable[[], object]) -> Callable[[], object]:
        def cleared() -> None:
            for tensor in (*logits, *probs):
                tensor.grad = None
            run()

        return cleared

    found = {
        "theirs": theirs,
        "from logits": from_logits,
        "logits and ids": router_output,
        "has p and ids": has_p_and_ids,
    }
    x_TD = torch.randn(tokens, DIM)
    for name in ("without", "with"):
        routers = build(layers, experts, top_k, normalize=False)  # such a router has p
        balancer = Balancer(routers, [AuxLoss(coef=1e-2, estimator="previous")]) if name == "with" else None
        found[name] = trained(routers, balancer, x_TD)
    return {name: clear(run) for name, run in found.items()}


def trained(routers: nn.ModuleList, balancer: Balancer | None, x_TD: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.SGD(routers.parameters(), lr=0.0)

    def run() -> None:
        loss = forward(routers, x_TD)
        (balancer.tap(loss) if balancer else loss).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def show_loss(arguments: argparse.Namespace) -> None:
    runs = contestants(arguments.tokens, arguments.layers, arguments.experts, arguments.top_k)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(arguments.rounds + 2):
        for name, run in runs.items():
            start = time.process_time()
            run()
            if index >= 2:
                times[name].append(1e3 * (time.process_time() - start))
    times["in training"] = [a - b for a, b in zip(times.pop("with"), times.pop("without"), strict=True)]
    print(
        f"Counting, loss and gradient: {arguments.tokens} tokens x {arguments.layers} layers x {arguments.experts} "
        f"experts, top-{arguments.top_k}\nCPU milliseconds of one thread, {arguments.rounds} rounds in turn: median "
        "(quartiles)\n"
    )
    print(f"{'':>16} {'transformers':>18} {'equipoise':>18} {'ratio in each round':>22}")
    for name in ("from logits", "logits and ids", "has p and ids", "in training"):
        ratios = [a / b for a, b in zip(times["theirs"], times[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name:>16} {span(times['theirs']):>18} {span(times[name]):>18} "
            f"{f'{middle:.1f}x ({low:.1f}-{high:.1f})':>22}",
            flush=True,
        )


# ---------------------------------------------------------------- the command


def span(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


PARTS = {"collective": show_collective, "memory": show_memory, "loss": show_loss}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("part", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all of them")
    made.add_argument("--ranks", type=int, default=8, help="most processes to measure with (2 to 8)")
    made.add_argument("--repeats", type=int, default=40, help="sums per size")
    made.add_argument("--latency", type=float, default=14.0, metavar="US", help="of a cluster: to begin a sum")
    made.add_argument("--hop", type=float, default=8.5, metavar="US", help="of a cluster: between two nodes")
    made.add_argument("--bandwidth", type=float, default=50.0, metavar="GB/S", help="of a cluster: per node")
    made.add_argument("--per-node", type=int, default=8, help="ranks that share a node")
    made.add_argument("--tokens", type=int, default=8192, help="of the losses; memory uses a quarter")
    made.add_argument("--layers", type=int, default=24, help="of the losses")
    made.add_argument("--experts", type=int, default=64, help="of the losses")
    made.add_argument("--top-k", type=int, default=8, help="of the losses")
    made.add_argument("--rounds", type=int, default=20, help="each runs every contestant once")
    return made


def main() -> None:
    arguments = parser().parse_args()
    if unknown := set(arguments.part) - set(PARTS):
        parser().error(f"expected {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}\n")
    for name in arguments.part or PARTS:
        PARTS[name](arguments)
        print()


if __name__ == "__main__":
    main()
