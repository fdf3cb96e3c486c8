"""``equipoise doctor``: what balancing a training configuration will really do, in words."""

from __future__ import annotations

import argparse
import json

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "what balancing a training configuration will really do"
EPILOG = """\
examples:
  equipoise doctor models/Qwen3-30B-A3B            a config.json of transformers
  equipoise doctor axolotl.yaml --world 8          axolotl, LLaMA-Factory, ms-swift, TRL, verl
  equipoise doctor train.sh                        a script with Megatron-LM's arguments
  equipoise doctor -- torchrun --nproc_per_node 8 pretrain_gpt.py --num-experts 64 ...
  equipoise doctor debug_model.toml                torchtitan up to 0.2
  equipoise doctor config.json --engine megatron-bridge

The engine is recognised by the names in the file. Nothing is run, trained or downloaded. docs/doctor.md says which
versions were read, and from where each statement is.

exit codes: 0 whatever is found; with --strict 1 where something does nothing, differs from what is written, or will
not start; 2 and 4 as everywhere.
"""
SERIOUS = ("off", "refused", "differs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="FILE",
        help="a configuration, its folder, a script; or -- and a launch line",
    )
    add("--engine", metavar="NAME", help="axolotl, llamafactory, megatron, megatron-bridge, ms-swift, torchtitan, "
        "transformers, trl or verl; of trl, megatron and torchtitan also a version: trl==1.9.0")  # fmt: skip
    add("--world", type=int, metavar="N", help="ranks in all")
    add("--micro-batch", type=int, metavar="B", help="sequences in one micro-batch of one rank")
    add("--accumulation", type=int, metavar="M", help="micro-batches per optimizer step and rank")
    add("--expert-parallel", type=int, metavar="N", help="ranks that share out the experts of a layer")
    add("--model", metavar="PATH", help="the model that a training configuration names: config.json, folder, or name")
    add("--strict", action="store_true", help="exit code 1 unless balancing happens as it is written")
    add("--json", action="store_true", help="everything as JSON")


def run(args: argparse.Namespace) -> int:
    from ..doctor import Options, diagnose, render, to_json

    options = Options(args.engine, args.world, args.micro_batch, args.accumulation, args.expert_parallel, args.model)
    case = diagnose(args.inputs, options)
    if args.json:
        print(json.dumps(to_json(case), indent=2, allow_nan=False))
    else:
        print(render(case, expert_parallel=args.expert_parallel), end="")
    serious = ("refused",) if case.ours else SERIOUS  # beside policies of ours the engine's own loss is off
    return 1 if args.strict and case.found(*serious) else 0
