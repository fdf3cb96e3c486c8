"""``equipoise fuse``: transformers over text and images as one sequence, experts by modality or mixed, compared."""

from __future__ import annotations

import argparse

from .side_by_side import FlagSettings, Parts, add_side_by_side, run_side_by_side

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

HELP = "train small transformers on text and images as one sequence: experts by modality against mixed ones; a report"
EPILOG = """\
strategies, one expert a token in each, or on average:
  mixed            all experts for all tokens; tokens choose, a balance loss over the whole batch
  mixed-classes    the same experts; a loss for text tokens and one for image tokens, each over its whole batch
  groups           text experts and image experts; tokens choose inside their group, a loss of each group's batch
  mixed-choice     all experts for all tokens; experts choose tokens from the whole batch
  groups-choice    text experts and image experts; experts choose from their group's tokens (MoMa)
  dense            no experts, a layer of the width of one
  mixed:NAME       any balance of `equipoise train --help`: mixed:none, groups:loss-free, groups:global@0.02
                   (a step is one micro-batch here: micro is what global is)

An expert that chooses its tokens sees tokens to come, which a language model has not. Beside each such router an
auxiliary one learns what it chooses and takes its place when the model is evaluated. The report has both losses, and
what the auxiliary routers get right.

without arguments: these six, three seeds each, on the text of this installation and the 1797 handwritten digits of
8 x 8 pixels that scikit-learn ships, a pixel a token of 17 greys; 3 layers of width 64 with 8 experts. A sequence is
a digit between its marks, its name before it, and a piece of text behind it or in front. Of runs of one seed data and
the weights of all other layers are the same.

examples:
  equipoise fuse --quick
  equipoise fuse --strategies mixed,groups --seeds 5 --steps 800
  equipoise fuse --data FOLDER --set data.size=8 --text my.txt     images and text of your own
  equipoise fuse --strategy groups-choice --out runs/one           one run, in this process

The same command again goes on where it was stopped, and adds what is new among its strategies and seeds.
docs/moma.md says what the layers do, in a model of your own too.
"""
FLAGS: FlagSettings = {
    "--data": ("data.data", str, "FOLDER", "your own images; folders in it are classes"),
    "--text": ("data.text", str, "PATH", "your own text, a file or a folder"),
    "--steps": ("train.steps", int, "N", "optimizer steps"),
    "--lr": ("train.lr", float, "X", "peak learning rate"),
    "--experts": ("model.experts", int, "N", "experts per layer, of all groups together"),
    "--seed": ("train.seed", int, "N", "the first; of weights and data"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_side_by_side(parser, FLAGS, strategies="all six", baseline="mixed", quick="60 steps", example="data.levels=9")


def run(arguments: argparse.Namespace) -> int:
    from ..lab.fusion.comparison import ROOM
    from ..lab.fusion.config import QUICK, read_config
    from ..lab.fusion.page import write_html
    from ..lab.fusion.strategies import DEFAULT
    from ..lab.fusion.summary import read_runs, summarize
    from ..lab.fusion.text import render

    parts = Parts(ROOM, read_config, QUICK, DEFAULT, read_runs, summarize, render, write_html)
    return run_side_by_side(arguments, FLAGS, parts)
