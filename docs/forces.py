"""Draws what each force does to the loads of a small layer that trains, for docs/policies.md.

python docs/forces.py > docs/forces.svg

One `MoE` layer of eight experts learns a map of tokens of two kinds, one seldom; the tokens have a mean, so that some
experts are preferred from the first step. Nothing differs between panels but the policies and, with a bias, the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

import torch

from equipoise import AuxLoss, Balancer, ExpertBias, MoE, Ratio, Target

DIM, EXPERTS, TOP_K, BATCH, LENGTH, STEPS, SELDOM, COEF = 16, 8, 2, 32, 32, 400, 0.2, 0.1
COSTS = (1.0, 1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0)
IDLE = {"groups": [[0], [1], [2], [3], [4], [5], [6, 7]], "targets": [1 / 9] * 6 + [1 / 3]}
WIDTH, HEIGHT, GAP, LEFT, TOP, COLUMNS = 196, 118, 26, 40, 46, 4
INK, PAPER, SOFT, STRONG, GOAL = "#1f2933", "#ffffff", "#9fb3c8", "#0b4f6c", "#c0392b"


class Panel(NamedTuple):
    """A run and what of it is drawn: one line for each number that ``read`` gives at a step, ``goal`` dashed."""

    title: str
    below: str
    policies: Sequence[AuxLoss | ExpertBias]
    read: Callable[[Balancer], Sequence[float]]
    goal: Sequence[float] = (1.0,)
    top: float = 4.0
    pale: int = 0  # the last lines


def loads(balancer: Balancer) -> list[float]:
    """Of each expert over the mean."""
    load_E = balancer.load()[0].double()
    return (load_E / load_E.mean()).tolist()


def pairs(balancer: Balancer) -> list[float]:
    """Of each group of two experts over the mean."""
    load_E = balancer.load()[0].double()
    load_G = load_E.view(-1, 2).sum(dim=1)
    return (load_G / load_G.mean()).tolist()


def idle(balancer: Balancer) -> list[float]:
    """Of six experts, and of the last two together, over the mean load of an expert."""
    each = loads(balancer)
    return [*each[:6], each[6] + each[7]]


def metric(name: str) -> Callable[[Balancer], list[float]]:
    """A number of a step that the balancer reports."""
    return lambda balancer: [balancer.metrics().get(f"balance/{name}", float("nan"))]


PANELS = (
    Panel("no policy", "load of each expert, even = 1", [], loads),
    Panel('AuxLoss("global_batch")', "load of each expert", [AuxLoss("global_batch", COEF)], loads),
    Panel('ExpertBias("sign")', "load of each expert", [ExpertBias("sign", 0.01)], loads),
    Panel('ExpertBias("proportional")', "load of each expert", [ExpertBias("proportional", 0.01)], loads),
    Panel('ExpertBias("momentum")', "load of each expert", [ExpertBias("momentum", 0.01)], loads),
    Panel('ExpertBias("quantile")', "load of each expert", [ExpertBias("quantile")], loads),
    Panel("AuxLoss(groups=4)", "load of each pair", [AuxLoss("global_batch", COEF, groups=4)], pairs),
    Panel("AuxLoss(costs=1, 2)", "load; pale: experts of cost 2",
          [AuxLoss("global_batch", COEF, costs=COSTS)], loads, (), pale=4),
    Panel("ExpertBias(targets=1/3 idle)", "load; the idle pair is to have 2.7",
          [ExpertBias("proportional", 0.02, **IDLE)], idle, (8 / 9, 8 / 3)),
    Panel('AuxLoss(tokens="seldom")', "MaxVio among the seldom tokens",
          [AuxLoss("global_batch", COEF, tokens="seldom")], metric("global_seldom/maxvio"), (0.0,), 3.0),
    Panel("AuxLoss(coef=Ratio(0.05))", "balance gradient / language model's", [AuxLoss("global_batch", Ratio(0.05))],
          metric("global/gradient_ratio"), (0.05,), 0.2),
    Panel("AuxLoss(coef=Target(0.5))", "MaxVio", [AuxLoss("global_batch", Target(0.5, start=1e-4))],
          metric("maxvio_global"), (0.5,), 3.0),
)  # fmt: skip


def train(panel: Panel, seed: int = 0) -> list[list[float]]:
    """What ``panel.read`` gives after each step."""
    torch.manual_seed(seed)
    biased = any(isinstance(policy, ExpertBias) for policy in panel.policies)
    layer = MoE(DIM, 2 * DIM, EXPERTS, TOP_K, gate="sigmoid" if biased else "softmax", batch_first=True)
    maps_2DD, mean_2D = torch.randn(2, DIM, DIM) / DIM**0.5, torch.randn(2, DIM)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=3e-3)
    balancer = Balancer(layer, panel.policies, optimizer)
    shown = []
    for _ in range(STEPS):
        seldom_BS = torch.rand(BATCH, LENGTH) < SELDOM
        kind_BS = seldom_BS.long()
        x_BSD = torch.randn(BATCH, LENGTH, DIM) + mean_2D[kind_BS]
        wanted_BSD = torch.tanh(torch.einsum("bsd,bsde->bse", x_BSD, maps_2DD[kind_BS]))
        y_BSD = layer(x_BSD, token_classes_BS={"seldom": seldom_BS})
        balancer.tap((y_BSD - wanted_BSD).square().mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        shown.append(list(panel.read(balancer)))
    return shown


def draw(panel: Panel, x: int, y: int) -> None:
    """Steps to the right, numbers up to ``panel.top``; what is above is cut at the edge."""
    seen = train(panel)

    def at(step: float, number: float) -> str:
        return f"{x + WIDTH * step / STEPS:.1f},{y + HEIGHT * (1 - min(number / panel.top, 1)):.1f}"

    print(f"<g><title>{escape(panel.title)}: {escape(panel.below)}</title>")
    print(f'<text x="{x}" y="{y - 20}" font-size="12.5" font-weight="bold">{escape(panel.title)}</text>')
    print(f'<text x="{x}" y="{y - 6}" font-size="11">{escape(panel.below)}</text>')
    print(f'<path d="M{x} {y}V{y + HEIGHT}H{x + WIDTH}" fill="none" stroke="{INK}"/>')
    for number in (0.0, panel.top):
        print(f'<text x="{x - 5}" y="{at(0, number).split(",")[1]}" font-size="10" text-anchor="end" '
              f'dominant-baseline="middle">{number:g}</text>')  # fmt: skip
    lines = list(zip(*seen, strict=True))
    for place, line in enumerate(lines):
        stroke = SOFT if place >= len(lines) - panel.pale else STRONG
        points = " ".join(at(step, number) for step, number in enumerate(line, 1) if step % 4 == 0 and number == number)
        print(f'<polyline points="{points}" fill="none" stroke="{stroke}" stroke-opacity="0.7"/>')
    for goal in panel.goal:
        print(f'<path d="M{at(0, goal)}H{x + WIDTH}" stroke="{GOAL}" stroke-dasharray="5 4" fill="none"/>')
    print("</g>")


def main() -> None:
    """Writes the SVG to standard output."""
    torch.set_num_threads(1)
    rows = -(-len(PANELS) // COLUMNS)
    width, height = LEFT + COLUMNS * (WIDTH + GAP + 16), rows * (HEIGHT + TOP + GAP) + 30
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" fill="{INK}">'
    )
    print(f'<rect width="{width}" height="{height}" fill="{PAPER}"/>')
    for place, panel in enumerate(PANELS):
        row, column = divmod(place, COLUMNS)
        draw(panel, LEFT + column * (WIDTH + GAP + 16), TOP + row * (HEIGHT + TOP + GAP))
    note = (
        f"{STEPS} steps of {BATCH * LENGTH:,} tokens, {EXPERTS} experts, top-{TOP_K}, coefficient {COEF:g}; the same "
    )
    note += "weights and tokens in all; dashed: what is asked for. docs/forces.py"
    print(f'<text x="{LEFT}" y="{height - 12}" font-size="11">{note}</text>')
    print("</svg>")


if __name__ == "__main__":
    main()
