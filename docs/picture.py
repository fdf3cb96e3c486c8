"""Draws the picture of the README from runs of one seed of a comparison: which expert each domain's tokens go to.

python docs/picture.py runs/compare-.../{micro,global,loss-free}-seed0 > docs/experts.svg
"""

from __future__ import annotations

import sys
from html import escape

from equipoise.storage.run_record import Run, read_run

CELL, GAP, LEFT, TOP, APART = 23, 2, 112, 62, 30
FULL = 3.0  # times the even share: the darkest cell
INK, PAPER, DEEP = "#1f2933", "#ffffff", (11, 79, 108)


def main() -> None:
    """Writes the SVG to standard output."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    runs = [read_run(path) for path in sys.argv[1:]]
    head = runs[0].header
    panel = head.num_experts * (CELL + GAP)
    height = TOP + len(head.domains) * (CELL + GAP) + 34
    width = LEFT + len(runs) * (panel + APART) - APART + 12
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" fill="{INK}">'
    )
    print(f'<rect width="{width}" height="{height}" fill="{PAPER}"/>')
    for place, run in enumerate(runs):
        draw(run, LEFT + place * (panel + APART), labels=place == 0)
    print(f'<text x="12" y="{height - 12}" font-size="11">layer {head.num_layers}, {head.num_experts} experts; a '
          "darker cell: more of that domain's choices. Held-out text, same weights at the start, same data (seed "
          f"{head.seed}).</text>")  # fmt: skip
    print("</svg>")


def draw(run: Run, x: int, *, labels: bool) -> None:
    """One panel: domains down, experts across, in the order of the domain that uses them most."""
    final = run.evaluations[-1]
    counts_DE = [layers[-1] for layers in final.counts]
    share_DE = [[count / sum(counts_E) for count in counts_E] for counts_E in counts_DE]
    order = sorted(range(len(share_DE[0])), key=lambda e: max(range(len(share_DE)), key=lambda d: share_DE[d][e]))
    information = sum(final.mutual_information) / len(final.mutual_information)
    print(f'<text x="{x}" y="24" font-size="15" font-weight="bold">{escape(run.header.strategy)}</text>')
    print(f'<text x="{x}" y="44" font-size="12">expert tells domain by {information:.2f} nats</text>')
    for row, (domain, share_E) in enumerate(zip(run.header.domains, share_DE, strict=True)):
        y = TOP + row * (CELL + GAP)
        if labels:
            middle = y + CELL / 2 + 4
            print(f'<text x="{LEFT - 8}" y="{middle}" font-size="12" text-anchor="end">{escape(domain)}</text>')
        for column, expert in enumerate(order):
            strength = min(share_E[expert] * len(order) / FULL, 1.0)
            colour = ",".join(str(round(245 + strength * (deep - 245))) for deep in DEEP)
            print(
                f'<rect x="{x + column * (CELL + GAP)}" y="{y}" width="{CELL}" height="{CELL}" fill="rgb({colour})"/>'
            )


if __name__ == "__main__":
    main()
