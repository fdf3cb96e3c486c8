"""``equipoise train``: one run of the lab's language model with one strategy."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..lab.config.schema import ParallelConfig, RunConfig, to_toml
from ..lab.config.strategies import describe_names, strategy_of
from .settings import add_settings, read, settings

__all__ = ["EPILOG", "HELP", "add_arguments", "add_layout", "layout_of", "run"]

HELP = "train one model with one strategy; writes a record, checkpoints and TensorBoard events"
EPILOG = f"""\
strategies and their policies:
{describe_names()}
They suit short runs and are not the library's defaults: AuxLoss("global_batch") has coef=0.01, estimator="filled".

details behind a name: global@0.02 (coefficient), global:prefix (estimator), loss-free@1e-2 (rate), micro:sigmoid
(gate), global:width (loads count by the width of their expert), micro->global:100 (change after 100 steps). Of a bias:
loss-free:proportional (rule), loss-free:constant (schedule of its rate), loss-free:multiply and loss-free:logits (where
it acts, in place of the scores), loss-free:micro_batch (a control: moved by each micro-batch's own load). Of the model:
global:rare=0.2 (ids that the last 20 % of the text are of see one expert), global:rare=0.2:visible=4 (the others see
4). A file can define its own, as [[strategy]] tables.

examples:
  equipoise train --strategy global@0.02
  equipoise train run.toml --steps 1000 --set train.checkpoint_every=200 --out runs/long
  equipoise train --model FOLDER --strategy global    goes on with a Hugging Face model (see `equipoise compare --help`)
  equipoise export runs/long FOLDER                   makes one of a run

several processes share a run under torchrun, each an equal part of every step's micro-batches: the loss curve is that
of one process, and a run may go on with another number of them. On one machine:
  torchrun --nproc-per-node 4 -m equipoise train run.toml --ep 2 --out runs/long
on two machines of 8, the same two lines on each, HOST being one of them; a rank that dies is started again, and all go
on from the last checkpoint (the first machine's --out folder is the one that counts):
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 --max-restarts 3 \\
      -m equipoise train run.toml --ep 8 --fsdp --out runs/long --continue
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE.toml", help="settings; all have defaults")
    parser.add_argument("--strategy", metavar="NAME", help="how the experts are balanced (default global+micro)")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/train-STRATEGY-TIME")
    exists = parser.add_mutually_exclusive_group()
    exists.add_argument(
        "--continue", dest="go_on", action="store_true", help="go on with the run in --out, if there is one"
    )
    exists.add_argument("--overwrite", action="store_true", help="remove the run in --out first")
    parser.add_argument("--plain", action="store_true", help="no progress bar")
    add_layout(parser)
    add_settings(parser)


def add_layout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes (under torchrun; see below)")
    group.add_argument("--dp", type=int, default=0, metavar="N", help="data ranks (default: all processes)")
    group.add_argument("--ep", type=int, default=1, metavar="N",
                       help="expert-parallel ranks, which shard the experts; divides --dp (default 1)")  # fmt: skip
    group.add_argument("--fsdp", action="store_true", help="shard parameters, gradients and moments over the ranks")


def layout_of(arguments: argparse.Namespace) -> ParallelConfig:
    """What ``add_layout`` has read."""
    return ParallelConfig(dp=arguments.dp, ep=arguments.ep, fsdp=arguments.fsdp)


def run(arguments: argparse.Namespace) -> int:
    values = settings(arguments) | ({"strategy": arguments.strategy} if arguments.strategy else {})
    config = read(RunConfig, arguments, values)
    strategy_of(config)  # a wrong name answers before anything is loaded
    if arguments.print_config:
        print(to_toml(config))
        return 0
    from ..lab.training.launch import launch_run

    done = launch_run(config, layout_of(arguments), out=arguments.out, resume=arguments.go_on,
                      overwrite=arguments.overwrite, plain=arguments.plain)  # fmt: skip
    if done.is_main:
        print(done.folder)
    return 0
