"""``equipoise plan``: what imbalance costs on a cluster, by balancing strategy and number of ranks."""

from __future__ import annotations

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, unknown_name

if TYPE_CHECKING:
    from ..plan import Cluster, Strategy
    from ..plan.recorded_loads import Observed

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "what imbalance costs on your cluster: seconds and memory of a step"
MOST = 2**20
EPILOG = """\
examples:
  equipoise plan                       Qwen3-30B-A3B on 64 H100, five strategies
  equipoise plan --preset deepseek-v3 --gpu h800 --ep 64 --gpus 2048
  equipoise plan runs/compare          the loads of your runs, on that cluster
  equipoise plan counts.npy --ep 4     counts [micro-batches, layers, experts]
  equipoise plan --maxvio before=0.9 --maxvio after=0.3,0.05
  equipoise plan --cluster ours.toml --set overlap=0.5 --set placement=packed
  equipoise plan --presets             models and GPUs that are known by name
  equipoise plan --check               against published step times

A cluster's file has one setting a line, e.g.
  preset = "qwen3-235b-a22b"
  gpu = "h100"
  gpus = 512
  ep = 32
  tokens = 8192          # of one GPU's micro-batch
  micro_batches = 4      # per step
  inter_gb_s = 38        # as measured, so:
  link_efficiency = 1

settings
  machine  gpus, gpus_per_node, tflops, efficiency, intra_gb_s, inter_gb_s,
           link_efficiency, latency_us, hop_us
  model    layers, experts, top_k, width, expert_hidden, dense_parameters,
           attention_width
  step     ep, replicas, placement (contiguous, strided, packed), tokens,
           sequence, micro_batches, recompute, overlap, overlap_gradients,
           once_per_node, sync (step, micro_batch, layer), activation_bytes,
           gradient_bytes, dense_ms
docs/plan.md says what each means, and has the equations.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "loads",
        nargs="*",
        metavar="LOADS",
        help="runs, folders of runs, inspections, .npy or .csv of counts (else typical)",
    )
    add("--maxvio", action="append", default=[], metavar="[NAME=]X[,Y]",
        help="loads by MaxVio: X over one GPU's micro-batch, Y over all text (default 0.1); repeatable")  # fmt: skip
    add("--maxvio-over", type=int, default=1, metavar="N", help="X is over the micro-batches of N GPUs together")
    add("--strategies", metavar="A,B", help="only these")
    add("--up-to", type=int, default=4096, metavar="N", help="largest EP of the growth table, 0: none (default 4096)")
    add("--seed", type=int, default=0, metavar="N", help="of the simulation")
    add("--json", action="store_true", help="all numbers as JSON")
    add("--presets", action="store_true", help="list models, GPUs and typical loads, and end")
    add("--check", action="store_true", help="compare the model with published step times, and end")
    cluster = parser.add_argument_group("the cluster (defaults < presets < the file < these)").add_argument
    cluster("--cluster", metavar="FILE.toml", help="settings, one a line")
    cluster("--preset", metavar="MODEL", help="a model by name")
    cluster("--gpu", metavar="GPU", help="a GPU by name")
    cluster("--gpus", type=int, metavar="N", help="GPUs in all")
    cluster("--ep", type=int, metavar="N", help="ranks that share out the experts of a layer")
    cluster("--tokens", type=int, metavar="N", help="of one GPU's micro-batch")
    cluster("--set", action="append", default=[], metavar="NAME=VALUE", help="any setting; may be repeated")


def run(args: argparse.Namespace) -> int:
    from .. import plan

    for name, least in (("seed", 0), ("up_to", 0), ("maxvio_over", 1)):
        if not least <= getattr(args, name) <= MOST:
            raise ConfigError(expected=f"--{name.replace('_', '-')} of {least} to {MOST:,}",
                              got=str(getattr(args, name)), do="choose another number")  # fmt: skip
    if args.presets:
        print(plan.render_presets(), end="")
        return 0
    if args.check:
        print(_check(args), end="")
        return 0
    observed = _observe(args.loads)
    cluster, notes = _cluster(args, observed)
    strategies = [*observed.strategies, *(_by_maxvio(text, cluster, args.maxvio_over) for text in args.maxvio)]
    chosen = _chosen(strategies or plan.typical(), args.strategies)
    found = plan.outlook(cluster, chosen, up_to=args.up_to, seed=args.seed, notes=[*observed.problems, *notes])
    if args.json:
        print(json.dumps(plan.to_json(found), indent=2, allow_nan=False))
    else:
        print(plan.render_outlook(found), end="")
    return 0


def _check(args: argparse.Namespace) -> str:
    from dataclasses import asdict

    from .. import plan

    found = plan.check(seed=args.seed)
    return json.dumps(asdict(found), indent=2) + "\n" if args.json else plan.render_check(found)


def _observe(paths: list[str]) -> Observed:
    """Records and files of counts, and folders of `equipoise inspect`."""
    from dataclasses import replace

    from .. import plan
    from ..storage.inspection_record import is_inspection

    folders = [path for path in paths if is_inspection(path)]
    found = plan.observe(path for path in paths if path not in folders)
    inspected = [_inspected(path) for path in folders]
    return replace(
        found,
        strategies=[*found.strategies, *(one for one, _ in inspected)],
        experts=sorted({*found.experts, *(experts for _, experts in inspected)}),
    )


def _inspected(folder: str) -> tuple[Strategy, int]:
    """The law with the MaxVio of an inspection's layers, those of the most common shape; and their experts."""
    from collections import Counter
    from pathlib import Path

    from .. import plan
    from ..storage.inspection_record import read_inspection

    inspection = read_inspection(folder)
    if not inspection.layers:
        raise DataError(expected=f"an inspection of MoE layers in {folder}", got="none", do="inspect another model")
    shapes = Counter((one.num_experts, one.top_k) for one in inspection.layers)
    (experts, top_k), number = shapes.most_common(1)[0]
    layers = [one for one in inspection.layers if (one.num_experts, one.top_k) == (experts, top_k)]
    batch, corpus = (sum(getattr(one, f"maxvio_{scope}") for one in layers) / number
                     for scope in ("micro_batch", "global"))  # fmt: skip
    pairs = inspection.facts.sequence_length * top_k
    windows = max(1, inspection.facts.equal_windows) * max(1, len(inspection.domains))
    skew = plan.fit(batch, corpus, experts=experts, sources=1, pairs=pairs * inspection.facts.micro_batch,
                    all_sources=windows, all_pairs=windows * pairs, top_k=top_k)  # fmt: skip
    origin = f"inspected {inspection.facts.model}: MaxVio {batch:.2f} per micro-batch, {corpus:.2f} over all"
    return plan.Strategy(Path(folder).resolve().name, skew, origin), experts


def _cluster(args: argparse.Namespace, observed: Observed) -> tuple[Cluster, list[str]]:
    """The cluster, and what has to be said about it: counted experts and layers hold where no model is named."""
    from .. import plan

    file = plan.read_toml(args.cluster) if args.cluster else {}
    given = {name: value for name in ("gpus", "ep", "tokens") if (value := getattr(args, name)) is not None}
    values: dict[str, Any] = {k: v for k, v in file.items() if k not in ("preset", "gpu")}
    values |= plan.parse_settings(args.set) | given
    preset, gpu = args.preset or file.get("preset"), args.gpu or file.get("gpu")
    notes: list[str] = []
    seen: dict[str, Any] = dict(observed.counted)
    if seen and preset is None and "experts" not in values:
        of_model = ("top_k", "width", "expert_hidden", "dense_parameters")
        if unsaid := [name for name in of_model if name not in values]:
            notes.append(f"counts do not say {', '.join(unsaid)}: taken from qwen3-30b-a3b; use --preset or --set")
        fitting = {"top_k": min(plan.Cluster.top_k, seen["experts"]), "ep": math.gcd(plan.Cluster.ep, seen["experts"])}
        values = fitting | seen | values
    cluster = plan.describe(preset, gpu, values)
    if seen and cluster.experts != seen["experts"]:
        raise ConfigError(expected=f"a model of {seen['experts']} experts, as counted", got=f"{cluster.experts}",
                          do="leave the preset out, or give the counts' MaxVio: --maxvio NAME=X")  # fmt: skip
    notes += [
        f"recorded with {experts} experts: their skew is carried over to {cluster.experts}"
        for experts in observed.experts
        if experts != cluster.experts
    ]
    return cluster, notes


def _by_maxvio(text: str, cluster: Cluster, over: int) -> Strategy:
    from .. import plan

    name, sign, numbers = text.rpartition("=")
    try:
        batch, *rest = (float(number) for number in numbers.split(","))
        if len(rest) > 1:
            raise ValueError
    except ValueError:
        raise ConfigError(expected="--maxvio NAME=X or NAME=X,Y", got=repr(text),
                          do="e.g. --maxvio global=0.8,0.1") from None  # fmt: skip
    name = name if sign else f"maxvio {numbers}"
    corpus = rest[0] if rest else min(0.1, batch)
    sources = over * max(1, round(cluster.tokens / cluster.sequence))
    skew = plan.fit(batch, corpus, experts=cluster.experts, sources=sources,
                    pairs=over * cluster.tokens * cluster.top_k, top_k=cluster.top_k)  # fmt: skip
    where = "one GPU's micro-batch" if over == 1 else f"the micro-batches of {over} GPUs"
    origin = f"MaxVio {batch:g} over {where}, {corpus:g} over all text"
    return plan.Strategy(name, skew, origin, counts=plan.needs_counts(name))


def _chosen(strategies: list[Strategy], names: str | None) -> list[Strategy]:
    if names is None:
        return strategies
    by_name = {one.name: one for one in strategies}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in by_name:
            raise unknown_name("strategy", name, by_name)
    return [by_name[name] for name in dict.fromkeys(wanted)]
