"""What balancing costs: a step with it over one without, losses, memory, sums.

    python benchmarks/balance_cost.py             # all four, about four minutes
    python benchmarks/balance_cost.py step        # two steps, about two minutes
    python benchmarks/balance_cost.py step --rounds 40 --policies none z
    python benchmarks/balance_cost.py loss --tokens 8192 --layers 24 --rounds 9
    python benchmarks/balance_cost.py memory
    python benchmarks/balance_cost.py collective --latency 20 --bandwidth 12.5

step: CPU time of a whole training step (forward, backward, SGD, metrics read)
    of the lab's language model with a list of policies, over the same step of
    the same model without a balancer. Each round takes the two in turn, in a
    changing order, on the same weights and memory; a ratio is that of one
    round, and what is printed is the median of the rounds, its 95 % bootstrap
    interval and the quartiles. "none" against "none" shows what such a
    comparison cannot see. "routers" is finer: the same difference measured on
    the model's routers without the rest, over the time of the whole step (their
    caches are warm, so it may be a little low). Beside it what was counted and
    does not depend on the machine: torch operations and bytes that they read
    and write, beyond the step without, for each layer and once a step (from
    models of 2 and 4 layers); passes over (tokens, experts); bytes kept for
    backward for each layer and token; sums over ranks.
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
import copy
import gc
import math
import multiprocessing
import os
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, cast

import numpy as np
import torch
import torch.distributed as dist
from _count import Work
from _report import add_json, figure, quartiles, save
from torch import Tensor, nn
from torch.distributed import TCPStore  # type: ignore[reportPrivateImportUsage]
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from equipoise import AuxLoss, Balancer, ExpertBias, ZLoss
from equipoise.autograd.token_layout import TokenLayout
from equipoise.distributed import Group, Ranks
from equipoise.functional import balance_loss, gate_probs, top_k_ids
from equipoise.lab.config.schema import ModelConfig
from equipoise.lab.models.transformer import LanguageModel
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
    lie = TokenLayout(num_sequences=1)
    return torch.stack([router(x_TD, lie).weights_TK.square().sum() for router in routers]).sum()


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


# ---------------------------------------------------------------- a training step

POLICIES: dict[str, list[Any] | None] = {
    "none": None,
    "look": [],
    "micro": [AuxLoss("micro_batch")],
    "sequence": [AuxLoss("sequence")],
    "global filled": [AuxLoss("global_batch")],
    "global exact": [AuxLoss("global_batch", estimator="exact")],
    "global previous": [AuxLoss("global_batch", estimator="previous")],
    "global+micro": [AuxLoss("global_batch"), AuxLoss("micro_batch", coef=1e-4)],
    "loss-free": [ExpertBias("proportional", rate=1e-3)],
    "deepseek-v3": [ExpertBias("proportional", rate=1e-3), AuxLoss("sequence", coef=1e-4, counts="unbiased")],
    "quantile": [ExpertBias("quantile")],
    "z": [ZLoss()],
}


class Trained:
    """One language model whose training step can be run with any policies, or with none, on the same memory."""

    def __init__(
        self, layers: int, width: int, experts: int, top_k: int, tokens: int, dtype: str = "float32", length: int = 256
    ) -> None:
        config = ModelConfig(
            layers=layers, width=width, heads=max(1, width // 64), head_dim=64, experts=experts, top_k=top_k,
            expert_hidden=width // 2, vocab_size=1024, gate="softmax",
        )  # fmt: skip
        self.model = LanguageModel(config, compute_dtype=getattr(torch, dtype))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-6)
        self.batch = torch.randint(1024, (max(1, tokens // length), min(length, tokens) + 1))
        self.states: dict[str, dict[str, Any]] = {}

    def step(self, policies: str, watched: Callable[[Callable[[], None]], None]) -> None:
        """Runs a step under ``watched``, with what the policies kept from their last step."""
        balancer = Balancer(self.model, chosen) if (chosen := POLICIES[policies]) is not None else None
        if balancer and policies in self.states:
            balancer.load_state_dict(self.states[policies])

        def run() -> None:
            loss = self.model(self.batch[:, :-1], self.batch[:, 1:])
            (balancer.tap(loss) if balancer else loss).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if balancer:
                balancer.metrics()

        watched(run)
        if balancer:
            state = balancer.state_dict()
            for layer in state["layers"].values():
                layer["expert_bias_E"] = None  # or the next step would route other tokens than the plain one
            self.states[policies] = state
            balancer.remove()
        for block in self.model.model.layers:  # a bias that nobody moves would be refused
            block.mlp.gate.expert_bias = None  # type: ignore[union-attr]

    def seconds(self, policies: str) -> float:
        """CPU time of a step."""
        took = []

        def timed(run: Callable[[], None]) -> None:
            start = time.process_time()
            run()
            took.append(time.process_time() - start)

        self.step(policies, timed)
        return took[0]

    def work(self, policies: str) -> Work:
        """What a step asks torch to do, once it has seen a step."""
        self.seconds(policies)
        work = Work()

        def counted(run: Callable[[], None]) -> None:
            with work:
                run()

        self.step(policies, counted)
        return work

    def kept(self, policies: str) -> int:
        """Bytes that forward keeps for backward, each storage once; not those of parameters."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage
            return tensor

        def noted(run: Callable[[], None]) -> None:
            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                run()

        self.step(policies, noted)
        return sum(storage.nbytes() for address, storage in saved.items() if address not in own)


def routers_alone(policies: str, shape: tuple[int, ...], rounds: int = 20) -> list[float]:
    """CPU seconds that the policies add to a step of the routers alone, in each round."""
    layers, width, experts, top_k, tokens = shape
    routers = nn.ModuleList(Router(width, experts, top_k) for _ in range(layers))
    free, x_TD = copy.deepcopy(routers), torch.randn(tokens, width)
    balancer = Balancer(routers, POLICIES[policies] or [])
    without, balanced = trained(free, None, x_TD), trained(routers, balancer, x_TD)
    added = []
    for index in range(rounds + 2):
        took = []
        for run in (without, balanced):
            start = time.process_time()
            run()
            if run is balanced:
                balancer.metrics()
            took.append(time.process_time() - start)
        added += [took[1] - took[0]] if index >= 2 else []
    return added


class Added(NamedTuple):
    """What policies add to a step."""

    operations: tuple[float, float]  # for each layer, and once
    bytes_touched: tuple[float, float]  # the same, of which those for each layer are for one token
    bytes_kept: float  # for each layer and token
    sums: int


def added_work(policies: str, width: int = 64, experts: int = 64, top_k: int = 8, tokens: int = 512) -> Added:
    """Counted, from models of 2 and 4 layers."""
    works, kept = [], []
    for layers in (2, 4):
        trained = Trained(layers, width, experts, top_k, tokens, length=128)
        plain, work = trained.work("none"), trained.work(policies)
        calls = sum(work.calls.values()) - sum(plain.calls.values())
        works.append((calls, work.touched - plain.touched, len(work.sums)))
        kept.append(trained.kept(policies) - trained.kept("none"))
    each, touched = ((works[1][i] - works[0][i]) / 2 for i in (0, 1))
    return Added(
        (each, works[0][0] - 2 * each),
        (touched / tokens, works[0][1] - 2 * touched),
        (kept[1] - kept[0]) / 2 / tokens,
        works[1][2],
    )


def bootstrap(values: list[float], draws: int = 2000) -> tuple[float, float]:
    """95 % of the medians of as many values drawn from them with replacement."""
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(values, size=(draws, len(values))), axis=1)
    low, high = np.quantile(medians, [0.025, 0.975])
    return float(low), float(high)


def show_step(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    shape = (arguments.step_layers, arguments.width, arguments.experts, arguments.top_k, arguments.step_tokens)
    torch.manual_seed(0)
    trained, ratios = Trained(*shape, arguments.dtype), {name: [] for name in arguments.policies}
    plain: list[float] = []
    for name in arguments.policies:
        trained.seconds(name)
    for _ in range(arguments.rounds):
        for name in random.sample(arguments.policies, len(arguments.policies)):
            gc.collect()
            turns = random.sample(["plain", "balanced"], 2)
            took = {turn: trained.seconds("none" if turn == "plain" else name) for turn in turns}
            ratios[name].append(took["balanced"] / took["plain"])
            plain.append(took["plain"])
    layers, width, experts, top_k, tokens = shape
    print(
        f"A training step over one without a balancer: {layers} layers, width {width}, {experts} experts top-{top_k}, "
        f"{tokens} tokens,\n{arguments.dtype}, {1e3 * statistics.median(plain):.0f} ms without, "
        f"{arguments.rounds} rounds of two in turn: median [95 %] (quartiles).\n"
        f"Counted at width 64 beyond the step without: operations for each layer + once, bytes touched for each\n"
        "layer and token, and as many passes over (tokens, experts) of fp32; bytes kept for each layer and token\n"
    )
    print(
        f"{'':>16} {'step':>32} {'routers':>24} {'operations':>11} {'touched':>8} {'passes':>7} {'kept':>5} {'sums':>5}"
    )
    for name, found in ratios.items():
        low, middle, high = statistics.quantiles(found, n=4)
        start, end = bootstrap(found)
        cells = f"{name:>16} {f'{middle:.4f} [{start:.4f}-{end:.4f}] ({low:.3f}-{high:.3f})':>32}"
        if POLICIES[name] is not None:
            alone = routers_alone(name, shape)
            one, (least, most) = statistics.median(plain), bootstrap(alone)
            finer = f"{1 + statistics.median(alone) / one:.4f} [{1 + least / one:.4f}-{1 + most / one:.4f}]"
            added = added_work(name, experts=experts, top_k=top_k)
            (each, once), touched = added.operations, added.bytes_touched[0]
            cells += f" {finer:>24} {f'{each:.0f} + {once:.0f}':>11} {touched:8.0f} {touched / 4 / experts:7.1f}"
            cells += f" {added.bytes_kept:5.0f} {added.sums:5}"
        print(cells, flush=True)
    bars = [(name, quartiles([100 * (value - 1) for value in found])) for name, found in ratios.items()]
    title = f"What policies add to a training step: {experts} experts, top-{top_k}, {tokens} tokens"
    return [figure(title, "% of the step", bars, note="The bar of none shows what such a comparison cannot see.")]


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
        return router(x_TD, TokenLayout(num_sequences=1)).weights_TK.square().sum()

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
        losses = [balance_loss(gate_probs(z), top_k_ids(z.detach(), top_k)) for z in logits]
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


def show_loss(arguments: argparse.Namespace) -> list[dict[str, Any]]:
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
    size = f"{arguments.tokens} tokens, {arguments.layers} layers, {arguments.experts} experts"
    times = {"transformers": times.pop("theirs")} | {f"equipoise, {name}": took for name, took in times.items()}
    bars = [(name, quartiles(took)) for name, took in times.items()]
    return [figure(f"Counting, loss and gradient: {size}", "ms, CPU time", bars)]


# ---------------------------------------------------------------- the command


def span(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.0f} ({low:.0f}-{high:.0f})"


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "step": show_step,
    "loss": show_loss,
    "memory": show_memory,
    "collective": show_collective,
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("part", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all of them")
    made.add_argument("--ranks", type=int, default=8, help="most processes to measure with (2 to 8)")
    made.add_argument("--repeats", type=int, default=40, help="sums per size")
    made.add_argument("--latency", type=float, default=14.0, metavar="US", help="of a cluster: to begin a sum")
    made.add_argument("--hop", type=float, default=8.5, metavar="US", help="of a cluster: between two nodes")
    made.add_argument("--bandwidth", type=float, default=50.0, metavar="GB/S", help="of a cluster: per node")
    made.add_argument("--per-node", type=int, default=8, help="ranks that share a node")
    made.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES), metavar="name",
                      help=f"of the step: {', '.join(POLICIES)}; default: all")  # fmt: skip
    made.add_argument("--width", type=int, default=256, help="of the step's model")
    made.add_argument("--step-layers", type=int, default=2, help="of the step's model")
    made.add_argument("--step-tokens", type=int, default=2048, help="of a step")
    made.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="the step computes in")
    made.add_argument("--tokens", type=int, default=8192, help="of the losses; memory uses a quarter")
    made.add_argument("--layers", type=int, default=24, help="of the losses")
    made.add_argument("--experts", type=int, default=64, help="of the step and the losses")
    made.add_argument("--top-k", type=int, default=8, help="of the step and the losses")
    made.add_argument("--rounds", type=int, default=10, help="each runs every contestant once")
    add_json(made)
    return made


def main() -> None:
    arguments = parser().parse_args()
    if unknown := set(arguments.part) - set(PARTS):
        parser().error(f"expected {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    print(f"{platform.processor() or platform.machine()}, one thread, torch {torch.__version__}\n")
    figures = []
    for name in arguments.part or PARTS:
        figures += PARTS[name](arguments) or []
        print()
    save(arguments.json, figures)


if __name__ == "__main__":
    main()
