"""Draws the picture of the README from two runs of one comparison: which expert each domain's tokens go to.

python docs/picture.py runs/compare-.../micro-seed0 runs/compare-.../global-seed0 > docs/experts.svg
"""

from __future__ import annotations

import sys
from html import escape

from equipoise.records import Run, read_run

CELL, GAP, LEFT, TOP = 17, 2, 112, 62
INK, PAPER, DEEP = "#1f2933", "#ffffff", (11, 79, 108)


def main() -> None:
    """Writes the SVG to standard output."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    runs = [read_run(path) for path in sys.argv[1:]]
    panel = runs[0].header.num_experts * (CELL + GAP)
    height = TOP + len(runs[0].header.domains) * (CELL + GAP) + 34
    width = LEFT + 2 * panel + 40
    print(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" fill="{INK}">'
    )
    print(f'<rect width="{width}" height="{height}" fill="{PAPER}"/>')
    for place, run in enumerate(runs):
        draw(run, LEFT + place * (panel + 28), labels=place == 0)
    layer = runs[0].header.num_layers
    print(f'<text x="{LEFT}" y="{height - 12}" font-size="11">layer {layer}, 16 experts; a darker cell: more of that '
          "domain's choices. Held-out text, same weights at the start, same data.</text>")  # fmt: skip
    print("</svg>")


def draw(run: Run, x: int, *, labels: bool) -> None:
    """One panel: domains down, experts across, in the order of the domain that uses them most."""
    final = run.evaluations[-1]
    counts_DE = [layers[-1] for layers in final.counts]
    share_DE = [[count / sum(counts_E) for count in counts_E] for counts_E in counts_DE]
    order = sorted(range(len(share_DE[0])), key=lambda e: max(range(len(share_DE)), key=lambda d: share_DE[d][e]))
    information = sum(final.mutual_information) / len(final.mutual_information)
    print(f'<text x="{x}" y="24" font-size="15" font-weight="bold">{escape(run.header.strategy)}</text>')
    print(f'<text x="{x}" y="44" font-size="12">perplexity {final.perplexity:.1f} · expert tells domain by '
          f"{information:.2f} nats</text>")  # fmt: skip
    for row, (domain, share_E) in enumerate(zip(run.header.domains, share_DE, strict=True)):
        y = TOP + row * (CELL + GAP)
        if labels:
            print(f'<text x="{LEFT - 8}" y="{y + 13}" font-size="12" text-anchor="end">{escape(domain)}</text>')
        for column, expert in enumerate(order):
            strength = min(share_E[expert] / 0.3, 1.0)
            colour = ",".join(str(round(245 + strength * (deep - 245))) for deep in DEEP)
            print(
                f'<rect x="{x + column * (CELL + GAP)}" y="{y}" width="{CELL}" height="{CELL}" fill="rgb({colour})"/>'
            )


if __name__ == "__main__":
    main()
