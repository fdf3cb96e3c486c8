"""``equipoise diffuse``: diffusion transformers whose experts choose from pools of tokens, compared in a report."""

from __future__ import annotations

import argparse

from .side_by_side import FlagSettings, Parts, add_side_by_side, run_side_by_side

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
FLAGS: FlagSettings = {
    "--data": ("data.data", str, "FOLDER", "your own images; folders in it are classes"),
    "--steps": ("train.steps", int, "N", "optimizer steps"),
    "--lr": ("train.lr", float, "X", "peak learning rate"),
    "--experts": ("model.experts", int, "N", "experts per layer"),
    "--seed": ("train.seed", int, "N", "the first; of weights, images and noise"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_side_by_side(
        parser, FLAGS, strategies="sample,batch,micro,global", baseline="sample", quick="60 steps",
        example="model.capacity=2",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    from ..lab.diffusion.comparison import ROOM
    from ..lab.diffusion.config import QUICK, read_config
    from ..lab.diffusion.page import write_html
    from ..lab.diffusion.strategies import DEFAULT
    from ..lab.diffusion.summary import read_runs, summarize
    from ..lab.diffusion.text import render

    parts = Parts(ROOM, read_config, QUICK, DEFAULT, read_runs, summarize, render, write_html)
    return run_side_by_side(arguments, FLAGS, parts)
