"""``equipoise diffuse``: diffusion transformers whose experts choose from pools of tokens, compared in a report."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "train small diffusion transformers on images: experts that choose from pools against balance losses; a report"
EPILOG = """\
strategies:
  sample           each expert takes its best tokens of one image (EC-DiT)
  samples:8        of a pool of 8 images
  batch            of the whole batch, all noise levels together (DiffMoE); a predictor says at inference what
                   experts would take
  micro, global    tokens choose; a balance loss over a micro-batch of 16 images, or over the whole batch
  dense            no experts, a layer of the width of one
  ...              any other name of `equipoise train --help`: loss-free, sequence (one image), global@0.02, none

without arguments: sample, batch, micro and global, three seeds each, on the 1797 handwritten digits of 8 x 8 pixels
that scikit-learn ships; a rectified flow, 4 layers of width 64, two of them with 8 experts. Of runs of one seed
weights, images and noise are the same. The page shows errors by noise level, which experts compute which level, and
drawn images.

examples:
  equipoise diffuse --quick
  equipoise diffuse --strategies sample,samples:4,samples:32,batch --seeds 5
  equipoise diffuse --data FOLDER --set data.size=32 --set model.patch=4     a folder of images, or one of each class
  equipoise diffuse --strategy batch --out runs/one                          one run, in this process

The same command again goes on where it was stopped, and adds what is new among its strategies and seeds.
docs/diffmoe.md says what the layers do, in a model of your own too.
"""
FLAGS: dict[str, tuple[str, type, str, str]] = {
    "--data": ("data.data", str, "FOLDER", "your own images; folders in it are classes"),
    "--steps": ("train.steps", int, "N", "optimizer steps"),
    "--lr": ("train.lr", float, "X", "peak learning rate"),
    "--experts": ("model.experts", int, "N", "experts per layer"),
    "--seed": ("train.seed", int, "N", "the first; of weights, images and noise"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", type=Path, metavar="FILE.toml", help="settings; all have defaults")
    parser.add_argument("--strategies", metavar="A,B", help="default sample,batch,micro,global")
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each strategy (default 3)")
    parser.add_argument("--baseline", metavar="NAME", help="strategy that differences are taken from (default: sample)")
    parser.add_argument(
        "--workers", type=int, default=0, metavar="N", help="processes at a time (default: one per core)"
    )
    parser.add_argument("--quick", action="store_true", help="60 steps, one seed: a look, not a result")
    parser.add_argument("--strategy", metavar="NAME", help="train one run with this strategy, in this process")
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="default: a folder under runs/ for each configuration"
    )
    parser.add_argument(
        "--continue", dest="go_on", action="store_true", help="with --strategy: go on with the run in --out"
    )
    parser.add_argument("--overwrite", action="store_true", help="remove the runs that are there first")
    parser.add_argument("--plain", action="store_true", help="with --strategy: no progress bar")
    group = parser.add_argument_group("settings (defaults < the file < these)")
    for flag, (setting, kind, metavar, text) in FLAGS.items():
        group.add_argument(flag, dest=setting, type=kind, metavar=metavar, help=f"{text} ({setting})")
    group.add_argument("--set", dest="set", action="append", default=[], metavar="NAME=VALUE",
                       help="any other setting, e.g. --set model.capacity=2; may be repeated")  # fmt: skip
    group.add_argument("--print-config", action="store_true", help="print all settings as a TOML file and end")


def run(arguments: argparse.Namespace) -> int:
    from ..lab.config.loading import parse_set, to_toml
    from ..lab.diffusion.config import QUICK, read_config

    values: dict[str, Any] = dict(QUICK if arguments.quick else {})
    for setting, *_ in FLAGS.values():
        if getattr(arguments, setting) is not None:
            values[setting] = getattr(arguments, setting)
    if arguments.strategy:
        values["strategy"] = arguments.strategy
    config = read_config(arguments.config, values | parse_set(arguments.set))
    if arguments.print_config:
        print(to_toml(config))
        return 0
    _check(arguments)
    from ..lab.config.strategies import slug
    from ..lab.diffusion.comparison import REPORT_NAME, compare, folder_of, train_one
    from ..lab.diffusion.page import write_html
    from ..lab.diffusion.strategies import DEFAULT
    from ..lab.diffusion.summary import read_runs, summarize
    from ..lab.diffusion.text import render

    if arguments.strategy:
        folder = arguments.out or folder_of(config) / f"{slug(config.strategy)}-seed{config.train.seed}"
        print(train_one(config, folder, resume=arguments.go_on, overwrite=arguments.overwrite, plain=arguments.plain))
        return 0
    names = [name.strip() for name in arguments.strategies.split(",")] if arguments.strategies else list(DEFAULT)
    if arguments.baseline is not None and arguments.baseline not in names:
        raise unknown_name("strategy that is compared, for --baseline", arguments.baseline, names)
    seeds = arguments.seeds if arguments.seeds is not None else 1 if arguments.quick else 3
    done = compare(config, names, seeds, out=arguments.out, overwrite=arguments.overwrite,
                   workers=arguments.workers)  # fmt: skip
    compared = summarize(read_runs(done.folder, names), arguments.baseline)
    print(render(compared))
    write_html(compared, done.folder / REPORT_NAME)
    print(f"\nreport: {done.folder / REPORT_NAME}")
    return done.exit_code


def _check(arguments: argparse.Namespace) -> None:
    """Raises ConfigError for flags of a comparison beside those of one run."""
    several = {"--strategies": arguments.strategies, "--seeds": arguments.seeds, "--baseline": arguments.baseline,
               "--workers": arguments.workers}  # fmt: skip
    single = {"--continue": arguments.go_on, "--plain": arguments.plain}
    wrong = [flag for flag, given in (several if arguments.strategy else single).items() if given]
    if wrong:
        raise ConfigError(
            expected="flags of one run (--strategy NAME) or of a comparison",
            got=f"{', '.join(wrong)} {'with' if arguments.strategy else 'without'} --strategy",
            do="leave them out; a comparison goes on by itself",
        )
