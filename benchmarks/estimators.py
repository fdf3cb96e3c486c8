"""Which f a rank should balance with before the step's load is known: gradient errors, and what the sums cost.

    python benchmarks/estimators.py record --seeds 0 1 2 3 --to build/routing  # three minutes a seed
    python benchmarks/estimators.py errors build/routing/*.npz                 # ten minutes for four seeds
    python benchmarks/estimators.py cost                                       # a second

record: trains the lab's default model on the installed text under the exact
    global-batch loss, and in two windows of 20 steps routes a pool of 1056
    sequences of 128 tokens, equally many of each domain, through the weights of
    each step.
errors: cuts such a pool into R ranks x M micro-batches of one sequence each, so
    a step grows with R and M, and averages up to 8 disjoint steps; 64 x 64 uses
    each sequence four times. Orders: shuffled; each rank its own domain; each
    micro-step its own domain on all ranks. A cell: |g - g_exact| / |g_exact|
    over the logits of all tokens, as `Balancer.estimator_error` has it, over the last
    8 steps of the windows (its share of that of ``previous`` with a 95 %
    interval, Student's t, over windows; the cosine; the error of g summed over
    the tokens of each domain, and over all: gradients of a bias at the logits,
    where what differs from rank to rank by chance averages out).
cost: what an estimator adds to a step of 2 s and 64 micro-batches, with 48
    layers of 128 experts, by the model of `equipoise.plan`: sums up a tree of
    nodes and down (14 us to begin, 1.2 us a hop inside a node, 8.5 us outside),
    and how long groups of 8 ranks then wait for the slowest, as a share of the
    step, where nothing else (FSDP, say) makes them meet in a micro-step.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _report import machine, versions
from torch import Tensor

from equipoise import AuxLoss, Balancer
from equipoise.lab.config.schema import ModelConfig, TrainConfig
from equipoise.lab.data.packing import BatchSampler, prepare
from equipoise.lab.models.transformer import LanguageModel
from equipoise.lab.training.trainer import learning_rate
from equipoise.layers import Router
from equipoise.plan.cluster import Cluster
from equipoise.plan.cost import COUNT_BYTES, STEP_BYTES, step_time, sum_seconds
from equipoise.plan.straggler import straggler
from equipoise.plan.typical_skews import TYPICAL
from equipoise.report.data.statistics import t_quantile

RANKS, MICRO_BATCHES = (1, 2, 8, 64), (1, 4, 16, 64)
LENGTH, POOL, WINDOW, JUDGED = 128, 1056, 20, 8  # tokens a sequence; sequences; steps of a window, the last of them
WINDOWS = (60, 200)  # last steps
DECAYS = (0.9, 0.5)


# ---------------------------------------------------------------- record


def record(seed: int, to: Path) -> None:
    """Trains one seed and writes a file for each window."""
    train = TrainConfig(seed=seed)
    data = prepare(None, vocab_size=ModelConfig().vocab_size, sequence_length=2 * LENGTH)
    batches = BatchSampler(data, seed=seed, sequences_per_micro_batch=1, micro_batches=train.micro_batches)
    pools = BatchSampler(data, seed=seed + 1000, sequences_per_micro_batch=1, micro_batches=POOL)
    model = LanguageModel(ModelConfig(), seed=seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=train.lr, betas=train.betas, weight_decay=train.weight_decay, fused=True
    )
    balancer = Balancer(model, [AuxLoss(estimator="exact")], optimizer)
    kept: list[dict[str, np.ndarray]] = []
    for step in range(max(WINDOWS)):
        tokens_BS = torch.cat([one.tokens_BS for one in batches.step(step)])[:, : LENGTH + 1]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step + 1)
        balancer.tap(model(tokens_BS[:, :-1], tokens_BS[:, 1:])).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip)
        optimizer.step()
        optimizer.zero_grad()
        ends = next((end for end in WINDOWS if end - WINDOW <= step < end), None)
        if ends is not None:
            kept.append(routed(model, pools, step, judged=step >= ends - JUDGED))
        if step + 1 == ends:
            to.mkdir(parents=True, exist_ok=True)
            columns = {key: np.stack([one[key] for one in kept if key in one]) for key in kept[-1]}
            np.savez(to / f"seed{seed}-step{ends}.npz", **columns)  # type: ignore[arg-type]
            kept = []


@torch.no_grad()
def routed(model: LanguageModel, pools: BatchSampler, step: int, *, judged: bool) -> dict[str, np.ndarray]:
    """Of a pool's sequences, under these weights: domains (N), counts (N, L, E), Gram and sum of J (N, L, E, E)."""
    micro_batches = pools.step(step)
    routings: list[tuple[Tensor, Tensor]] = []
    hooks = [
        router.register_forward_hook(lambda _module, _args, routing: routings.append((routing[1], routing[2])))
        for router in model.modules()
        if isinstance(router, Router)
    ]
    tokens_NS = torch.cat([one.tokens_BS for one in micro_batches])[:, :LENGTH]
    model.eval()
    found: dict[str, list[Tensor]] = {"counts": [], "gram": [], "sum": []}
    for tokens_BS in tokens_NS.split(64):
        routings.clear()
        model.hidden(tokens_BS)
        of_layers: dict[str, list[Tensor]] = {key: [] for key in found}
        for ids_TK, logits_TE in routings:
            batch, experts = len(tokens_BS), logits_TE.shape[1]
            ids_BC = ids_TK.reshape(batch, -1)
            of_layers["counts"].append(torch.zeros(batch, experts).scatter_add_(1, ids_BC, torch.ones(ids_BC.shape)))
            probs_BSE = logits_TE.softmax(dim=-1).view(batch, -1, experts)
            square_BSE = probs_BSE.square()
            cross_BEE = square_BSE.mT @ probs_BSE
            outer_BEE = probs_BSE.mT @ (square_BSE.sum(dim=-1, keepdim=True) * probs_BSE)
            of_layers["gram"].append(torch.diag_embed(square_BSE.sum(dim=1)) - cross_BEE - cross_BEE.mT + outer_BEE)
            of_layers["sum"].append(torch.diag_embed(probs_BSE.sum(dim=1)) - probs_BSE.mT @ probs_BSE)
        for key, tensors in of_layers.items():
            found[key].append(torch.stack(tensors, dim=1))
    for hook in hooks:
        hook.remove()
    model.train()
    keys = tuple(found) if judged else ("counts",)
    domains = torch.cat([one.domain_ids_B for one in micro_batches]).numpy()
    return {key: torch.cat(found[key]).numpy() for key in keys} | {"domains": domains}


# ---------------------------------------------------------------- errors


@dataclass
class Known:
    """All that an estimator may look at in one step, for all R ranks and M micro-steps at once; (..., L, E)."""

    own: Tensor  # (R, M, L, E) counts of each rank's micro-steps 1..m
    come: Tensor  # (M, L, E) the same of all ranks
    before: Tensor  # (L, E) counts of the step before
    ema: dict[float, Tensor]  # (L, E) fractions

    @property
    def ranks(self) -> int:
        return len(self.own)


def fill(come: Tensor, before: Tensor) -> Tensor:
    """Counts that have come and, for the tokens still to come, the load of the step before."""
    missing = (before.sum(-1, keepdim=True) - come.sum(-1, keepdim=True)).clamp(min=0)
    return come + missing * share(before)


def share(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp(min=1)


ESTIMATORS: dict[str, Callable[[Known], Tensor]] = {
    "prefix (M sums)": lambda known: share(known.come),
    "filled at every micro-step (M sums)": lambda known: share(fill(known.come, known.before)),
    "filled at 1, 2, 4, 8, ... (1 + log2 M sums)": lambda known: share(fill(known.come[doubling(known)], known.before)),
    "previous": lambda known: share(known.before),
    **{f"ema {decay}": lambda known, decay=decay: known.ema[decay] for decay in DECAYS},
    "filled_local": lambda known: share(fill(known.own, known.before)),
    "own counts for all others": lambda known: share(fill(known.own * known.ranks, known.before)),
}


def doubling(known: Known) -> list[int]:
    """For each micro-step the last one at which ranks shared what had come; one rank knows all its own."""
    return [m if known.ranks == 1 else 2 ** ((m + 1).bit_length() - 1) - 1 for m in range(len(known.come))]


def orders(domains_N: np.ndarray, ranks: int, micro_batches: int, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """(name, places in the pool (steps, R, M)) for each order of data that this cut can have."""
    generator, wanted, names = np.random.default_rng(seed), ranks * micro_batches, np.unique(domains_N)
    steps = max(1, min(8, len(domains_N) // wanted))

    def drawn(places: np.ndarray, count: int) -> np.ndarray:
        return np.concatenate([generator.permutation(places) for _ in range(-(-count // len(places)))])[:count]

    yield "shuffled", drawn(np.arange(len(domains_N)), steps * wanted).reshape(steps, ranks, micro_batches)
    for kind, rows, columns in (("per rank", ranks, micro_batches), ("per micro-step", micro_batches, ranks)):
        if rows == 1 or (kind == "per micro-step" and rows < len(names)):
            continue
        turns = [np.arange(i, rows, len(names)) for i in range(min(rows, len(names)))]  # rows of each domain
        cuts = np.empty((steps, rows, columns), dtype=np.int64)
        for name, mine in zip(names, turns, strict=False):
            places = drawn(np.flatnonzero(domains_N == name), steps * len(mine) * columns)
            cuts[:, mine] = places.reshape(steps, len(mine), columns)
        yield f"a domain {kind}", cuts if kind == "per rank" else cuts.swapaxes(1, 2)


def errors(file: Path, ranks: int, micro_batches: int) -> dict[tuple[str, str], np.ndarray]:
    """(order, estimator) -> (error over tokens, cosine, error of each domain's sum, of the sum), of one window."""
    window = np.load(file)
    counts, grams, sums = (torch.from_numpy(window[key]) for key in ("counts", "gram", "sum"))
    number, found = len(counts), {}
    cuts = [dict(orders(domains, ranks, micro_batches, seed)) for seed, domains in enumerate(window["domains"])]
    for order in cuts[0]:
        for chunk in range(len(cuts[0][order])):
            places = [torch.from_numpy(np.asarray(cut[order][chunk])) for cut in cuts]
            loads = [one[place].double() for one, place in zip(counts, places, strict=True)]  # (R, M, L, E) each
            ema = {decay: torch.zeros_like(loads[0][0, 0]) for decay in DECAYS}
            for step in range(number):
                at = step - (number - len(grams))
                if at >= 0:
                    past = {decay: one / one.sum(-1, keepdim=True) for decay, one in ema.items()}
                    known = Known(
                        loads[step].cumsum(1), loads[step].sum(0).cumsum(0), loads[step - 1].sum((0, 1)), past
                    )
                    truth = share(loads[step].sum((0, 1)))
                    domains = torch.from_numpy(window["domains"][step])[places[step]]
                    here = grams[at][places[step]].double(), sums[at][places[step]].double(), domains
                    for name, estimator in ESTIMATORS.items():
                        fraction = estimator(known).expand_as(loads[step])
                        found.setdefault((order, name), []).append(judge(fraction, truth, *here))
                for decay in DECAYS:
                    ema[decay] = decay * ema[decay] + (1 - decay) * share(loads[step].sum((0, 1)))
    return {key: np.mean(rows, axis=0) for key, rows in found.items()}


def judge(fraction: Tensor, truth: Tensor, gram: Tensor, total: Tensor, domains: Tensor) -> tuple[float, ...]:
    off, truth = fraction - truth, truth.expand_as(fraction)

    def product(one: Tensor, other: Tensor) -> float:
        return torch.einsum("rmle,rmlef,rmlf->", one, gram, other).item()

    def summed(one: Tensor) -> Tensor:
        """(domains, L, E)"""
        pushes = torch.einsum("rmlef,rmlf->rmle", total, one).flatten(0, 1)
        return pushes.new_zeros(int(domains.max()) + 1, *pushes.shape[1:]).index_add_(0, domains.flatten(), pushes)

    exact, own = product(truth, truth), product(fraction, fraction)
    wrong, right = summed(off), summed(truth)
    cosine = product(fraction, truth) / max((exact * own) ** 0.5, 1e-300)
    by_domain, of_all = (one(wrong) / one(right) for one in (torch.norm, lambda push: push.sum(0).norm()))
    return (max(product(off, off), 0) / exact) ** 0.5, cosine, by_domain.item(), of_all.item()


def print_errors(files: list[Path], ranks: list[int], micro_batches: list[int]) -> None:
    print(f"{machine()}; {versions('torch', 'equipoise')}; windows: {', '.join(file.stem for file in files)}")
    for many in ranks:
        cells = [[errors(file, many, pieces) for file in files] for pieces in micro_batches]
        for order in dict.fromkeys(order for cell in cells for order, _ in cell[0]):
            print(f"\n{many} ranks, {order}\n\n| estimator | " + " | ".join(f"M = {m}" for m in micro_batches) + " |")
            print("|---" * (1 + len(micro_batches)) + "|")
            for name in ESTIMATORS:
                print(f"| {name} | " + " | ".join(summary(cell, order, name) for cell in cells) + " |", flush=True)


def summary(cell: list[dict[tuple[str, str], np.ndarray]], order: str, name: str) -> str:
    """Error over tokens (its share of that of ``previous``, 95 % over windows; cosine; error by domain, of the sum)."""
    if (order, name) not in cell[0]:
        return "-"
    found, before = (np.stack([window[order, one] for window in cell]) for one in (name, "previous"))
    ratio, (error, cosine, domain, total) = found[:, 0] / before[:, 0], found.mean(axis=0)
    width = t_quantile(len(ratio) - 1) * ratio.std(ddof=1) / len(ratio) ** 0.5 if len(ratio) > 1 else np.nan
    return f"{error:.3f} ({ratio.mean():.2f} ± {width:.2f}; {cosine:.2f}; {domain:.2f}, {total:.2f})"


# ---------------------------------------------------------------- cost


def print_cost(gpus: tuple[int, ...] = (8, 64, 4096), micro_batches: int = 64, step: float = 2.0) -> None:
    skew, one = straggler(TYPICAL["global"], Cluster()), Cluster()
    counts, sums = (size * one.experts * one.layers for size in (COUNT_BYTES, STEP_BYTES))
    print(
        "| ranks | estimator | sums inside backward | bytes of each | ms a step | of a 2 s step | waiting for others |"
    )
    print("|---|---|---|---|---|---|---|")
    for ranks in gpus:
        cluster = Cluster(gpus=ranks, micro_batches=micro_batches, sync="step")
        time = step_time(cluster, skew, counts=True)
        for names, number, size in (
            ("`previous`, `ema`, `filled_local`", 0, 0),
            ("`exact`, after its counting pass", 1, counts),
            ("`filled` at 1, 2, 4, 8, ...", micro_batches.bit_length(), counts),
            ("`prefix`, `filled` at every micro-step", micro_batches, counts),
            ("the step's own sum, with every policy", 1, sums),
        ):
            seconds = number * sum_seconds(cluster, size, ranks)
            waits = time.groups * max(number**0.5 - 1, 0) / (time.total - time.balance_sums)  # as in `step_time`
            row = (ranks, names, number, f"{size:,}", f"{1e3 * seconds:.2f}", f"{seconds / step:.3%}", f"{waits:.1%}")
            print("| " + " | ".join(map(str, row)) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(required=True, dest="part")
    (recorded := parts.add_parser("record")).add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    recorded.add_argument("--to", type=Path, default=Path("build/routing"))
    (judged := parts.add_parser("errors")).add_argument("files", type=Path, nargs="+")
    judged.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    judged.add_argument("--micro-batches", type=int, nargs="+", default=MICRO_BATCHES)
    parts.add_parser("cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "record":
        for seed in args.seeds:
            record(seed, args.to)
    elif args.part == "errors":
        print_errors(args.files, args.ranks, args.micro_batches)
    else:
        print_cost()


if __name__ == "__main__":
    main()
