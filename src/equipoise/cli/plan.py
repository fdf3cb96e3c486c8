"""``equipoise plan``: what imbalance costs on a cluster, by balancing strategy and number of ranks."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from ..errors import ConfigError

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
  equipoise plan --out plan.html       the same with figures
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
    add("--out", metavar="FILE", help="also one self-contained HTML page with figures, e.g. plan.html")
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
        checked = plan.calibrate(seed=args.seed)
        print(json.dumps(asdict(checked), indent=2) + "\n" if args.json else plan.render_calibration(checked), end="")
        return 0
    given = {name: value for name in ("gpus", "ep", "tokens") if (value := getattr(args, name)) is not None}
    scenario = plan.make_scenario(args.loads, plan.parse_settings(args.set) | given, file=args.cluster,
                                  preset=args.preset, gpu=args.gpu, maxvio=args.maxvio, maxvio_over=args.maxvio_over,
                                  only=args.strategies)  # fmt: skip
    found = plan.forecast(scenario.cluster, scenario.strategies, up_to=args.up_to, seed=args.seed, notes=scenario.notes)
    page = plan.write_page(found, scenario.strategies, args.out) if args.out else None
    as_json = json.dumps(plan.to_json(found), indent=2, allow_nan=False) + "\n"
    print(as_json if args.json else plan.render_forecast(found), end="")
    if page and not args.json:
        print(f"\nPage: {page}")
    return 0
