"""A comparison of fusion runs as one HTML file without scripts: equal runs give equal bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...report.data.formatting import clean, number
from ...report.html.rendering import render
from ...report.html.widgets import Cell, Part, Section, table
from ...storage.files import atomic_write
from ..comparison.page_parts import COLOURS, STYLES, difference_cell, expert_map, origin
from .strategies import MODALITIES
from .summary import Compared, StrategySummary

__all__ = ["render_html", "write_html"]


def write_html(compared: Compared, path: Path) -> None:
    """Raises OutputError where the file cannot be written, ConfigError where jinja2 is missing."""
    atomic_write(path, render_html(compared).encode(), do="free disk space, or name another folder with --out")


def render_html(compared: Compared) -> str:
    """The page as text."""
    c, many = compared, len(compared.strategies)
    seeds = {run.header.seed for one in c.strategies for run in one.runs}
    header = c.strategies[0].runs[0].header
    facts = [
        f"{many} {'strategy' if many == 1 else 'strategies'} × {len(seeds)} {'seed' if len(seeds) == 1 else 'seeds'}",
        f"{c.step} steps of {header.config['train']['sequences']} sequences",
        f"{header.num_layers} layers of {max(one.runs[0].header.num_experts for one in c.strategies)} experts",
        "images of a folder" if header.config["data"]["data"] else "digits of scikit-learn",
    ]
    sections = [
        Section("Losses", LOSSES, [_losses(c)]),
        Section("Which experts compute text and images", MAPS, [("maps", {"rows": _maps(c)})]),
        Section("Loads and sizes", LOADS, [_loads(c)]),
    ]
    if choosing := [(at, one) for at, one in enumerate(c.strategies) if one.numbers["accuracy text"].n]:
        sections.append(Section("Where experts choose", CHOICES, [_choices(choosing)]))
    sections.append(Section("Where this comes from", "", origin(c.strategies)))
    return render(
        "small_runs.html.jinja", "equipoise.lab.comparison", title=" · ".join(one.name for one in c.strategies[:4]),
        headline=c.headline, quality="", facts=facts, sections=sections, problems=c.problems, styles=STYLES,
        mark="experts for text and images", command="fuse",
    )  # fmt: skip


LOSSES = """\
Nats per token on text and images that were not trained on, as a model that sees no token to come computes them. Marks
around images are in neither. Differences are paired by seed, with 95 % intervals; below 0 is better."""
MAPS = """\
A row of maps for each strategy, a map for each layer: which experts compute the tokens of each modality. Colour: the
expert's share of the modality's choices, over the even share of all experts; the first seed."""
LOADS = """\
MaxVio: fullest expert over the even share of the experts that are open to the modality, minus 1. Information: nats
between expert and modality, 0 where both use all experts alike and at most 0.693. Active: parameters that compute a
token, its routers with them; without the routers they are alike in all strategies."""
CHOICES = """\
Experts that choose from a batch see tokens to come; auxiliary routers say of each token and expert whether it would be
chosen, so that inference is causal. Chosen: the loss by the choice itself, which no language model could have."""


def _losses(compared: Compared) -> Part:
    rows = []
    for at, one in enumerate(compared.strategies):
        cells = [Cell(one.name, colour=at)]
        for name in MODALITIES:
            mean, seeds = one.mean(f"loss {name}"), len(one.runs)
            cells.append(Cell(number(mean, 4), mean, [("", f"{seeds} {'seed' if seeds == 1 else 'seeds'}")]))
            cells.append(difference_cell(one.differences[name]))
        rows.append(cells)
    against = f"Against {clean(compared.baseline)}"
    return table("losses", "losses of each strategy", ["Strategy", "Text", against, "Image", against], rows)


def _maps(compared: Compared) -> list[dict[str, Any]]:
    """A row of maps, one for each layer, for each strategy with experts."""
    return [
        {"name": one.name, "colour": at % COLOURS,
         "maps": [(f"layer {layer}", expert_map(cells, MODALITIES, range(len(cells[0])),
                                                f"share of text and image tokens of each of {len(cells[0])} experts"))
                  for layer, cells in enumerate(one.share)]}
        for at, one in enumerate(compared.strategies)
        if len(one.share[0][0]) > 1
    ]  # fmt: skip


def _loads(compared: Compared) -> Part:
    heads = ["Strategy", "MaxVio, text", "image", "Information", "Experts per text token", "per image token",
             "Parameters active", "of all"]  # fmt: skip
    rows = [
        [Cell(one.name, colour=at), *(Cell(number(one.mean(f"maxvio {name}"), 2)) for name in MODALITIES),
         Cell(number(one.mean("information"), 3)),
         *(Cell(number(one.mean(f"experts {name}"), 2)) for name in MODALITIES),
         Cell(f"{one.runs[0].header.active_parameters / 1e3:,.0f} K"),
         Cell(f"{one.runs[0].header.parameters / 1e3:,.0f} K")]
        for at, one in enumerate(compared.strategies)
    ]  # fmt: skip
    return table("loads", "loads and sizes of each strategy", heads, rows)


def _choices(choosing: list[tuple[int, StrategySummary]]) -> Part:
    heads = ["Strategy", "Tokens", "Chosen", "Causal", "Right", "Precise", "Found"]
    rows = [
        [Cell(one.name, colour=at), Cell(name), Cell(number(one.mean(f"chosen loss {name}"), 4)),
         Cell(number(one.mean(f"loss {name}"), 4)),
         *(Cell(f"{100 * one.mean(f'{what} {name}'):.0f} %") for what in ("accuracy", "precision", "recall"))]
        for at, one in choosing
        for name in MODALITIES
    ]  # fmt: skip
    return table("choices", "what auxiliary routers get right", heads, rows, left=(0, 1))
