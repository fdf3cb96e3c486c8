"""``equipoise compare``: strategies side by side, and a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, DataError
from ..lab.config.schema import QUICK, CompareConfig, to_toml
from .settings import add_settings, read, settings

if TYPE_CHECKING:
    from ..lab.comparison.comparison import Comparison

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

ROOT = Path("runs")
HELP = "train strategies side by side, same weights and same data, several seeds, and write a report"
EPILOG = """\
without arguments: micro, global and loss-free, five seeds each, 240 steps of 8192 tokens; a model of 2 layers of width
64 with 8 experts, top-2, on the text that the installation holds. A run takes a minute on a core that multiplies in
bf16 and two or more on another; as many go at a time as there are cores. Seed by seed: stopped after any seed, what is
there is a comparison (`equipoise report FOLDER`).

Why several seeds: two runs that differ in the seed alone end at different perplexities. So strategies are compared
seed by seed, and one is called better only where the 95% interval of these differences leaves out zero. One seed shows
what experts specialise in and how they are loaded, and never names a winner in perplexity.

examples:
  equipoise compare --quick
  equipoise compare --strategies micro,global,loss-free@1e-2 --seeds 8 --out runs/eight-seeds
  equipoise compare --strategies sequence,sequences:4,sequences:16,global --data my.jsonl
  equipoise compare --resume
  equipoise compare --model FOLDER --set data.sequence_length=512 --steps 100 --seeds 2

--model goes on from a Hugging Face folder: any mixture-of-experts model that AutoModelForCausalLM loads and equipoise
balances (docs/families.md), each strategy from the same weights. The text is cut with the folder's tokenizer. The gate
is part of the model: where it is softmax, "loss-free" moves its bias in proportion, 0.1 / experts a step; a bias that
the model chooses with stays as it is under a strategy without one. qwen3_moe and dots1 are computed by the lab's own
model, which is faster and gives the same logits (--set model.through=transformers: not so).

`equipoise train --help` lists the strategies and their policies. These are not the library's defaults: "global" is
AuxLoss("global_batch", coef=0.02, estimator="exact"); AuxLoss("global_batch") has coef=0.01, estimator="filled".

The same command again, or --resume, goes on with a comparison that was stopped; with --out, more strategies and seeds
are added to those that are there.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE.toml", help="settings; all have defaults")
    parser.add_argument("--strategies", "--policies", metavar="A,B", help="default micro,global,loss-free")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each strategy, for intervals (default 5)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes at a time (default: one per core)")
    parser.add_argument("--quick", action="store_true", help="40 steps, one seed: a look, not a result")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: runs/compare-TIME")
    parser.add_argument("--resume", nargs="?", type=Path, const=ROOT, metavar="FOLDER",
                        help="go on with this comparison, or with the newest one under runs/")  # fmt: skip
    exists = parser.add_mutually_exclusive_group()
    exists.add_argument("--overwrite", action="store_true", help="remove the runs in --out first")
    exists.add_argument(
        "--new", action="store_true", help="do not go on with a stopped comparison of the same settings"
    )
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    config = _config(arguments)
    if arguments.print_config:
        print(to_toml(config))
        return 0
    from ..lab.comparison.launch import launch_comparison

    comparison = launch_comparison(config, out=arguments.out, resume=arguments.resume, new=arguments.new,
                                   overwrite=arguments.overwrite)  # fmt: skip
    try:
        _report(comparison)
    except DataError:  # no run reached an evaluation; the reason has been printed
        if comparison.exit_code == 0:
            raise
    return comparison.exit_code


def _config(arguments: argparse.Namespace) -> CompareConfig:
    values = settings(arguments, QUICK if arguments.quick else None)
    if arguments.strategies is not None:
        values["strategies"] = arguments.strategies
    for name in ("seeds", "workers"):
        if getattr(arguments, name) is not None:
            values[name] = getattr(arguments, name)
    if arguments.resume and (values or arguments.config or arguments.out or arguments.overwrite):
        raise ConfigError(
            expected="--resume with no settings: the folder holds them",
            got=", ".join([*values, *["a file"] * bool(arguments.config), *["--out"] * bool(arguments.out)])
            or "--overwrite",
            do="leave them out, or name the folder with --out to add strategies and seeds",
        )
    if arguments.overwrite and not arguments.out:
        raise ConfigError(
            expected="--overwrite with --out FOLDER", got="no folder", do="name the folder to begin again in"
        )
    return read(CompareConfig, arguments, values)


def _report(comparison: Comparison) -> None:
    """The table on stdout and the page beside the runs; runs that failed before an evaluation are named in it."""
    from ..lab.comparison.comparison import REPORT_NAME
    from ..report import load_runs, render_terminal, summarize, write_html

    runs, problems = load_runs([comparison.folder])
    summary = summarize(runs, problems=problems)
    print(render_terminal(summary))
    print(f"report: {write_html(summary, comparison.folder / REPORT_NAME)}")
