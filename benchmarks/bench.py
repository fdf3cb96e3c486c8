"""`make bench`: times everything that this library claims about speed, and writes a page with pictures.

    python benchmarks/bench.py                    # all, about ten minutes: runs/bench.html
    python benchmarks/bench.py layer balance      # some of them
    python benchmarks/bench.py --quick            # few rounds: whether it works, not a result

Each benchmark is a command of its own, whose text is shown while it runs and kept on the page. A machine that does
anything else beside gives other numbers: the page has the load when each began.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from _report import machine, versions

HERE = Path(__file__).parent
# name: (command, the same with few rounds, what it answers)
BENCHMARKS: dict[str, tuple[list[str], list[str], str]] = {
    "layer": (["moe_layer.py"], ["--rounds", "5", "--seconds", "5"], "The MoE layer against other layers"),
    "balance": (["balance_cost.py"], ["--rounds", "3", "--repeats", "5"], "What balancing costs"),
    "trainer": (["trainer_speed.py"], ["--rounds", "3"], "The lab's trainer against transformers'"),
    "growth": (["growth.py"], ["--rounds", "3"], "How a step grows"),
}
LEADS = {
    "layer": "Forward and backward, routing included, of layers that compute the same: ours, loops and grouped "
    "products behind the same router, and transformers' block; dense is a SwiGLU of the FLOPs of the active experts.",
    "balance": "A step with a list of policies over the same step without; and the balance loss itself.",
    "trainer": "The same model on the same tokens, AdamW, one thread.",
    "growth": "One axis at a time, from one point: a slope of 1 is proportional.",
}
WIDE, NAMES, ROW, TAIL = 760, 250, 30, 110  # of a picture: its width, what the names take, a bar, what a value takes


def run(name: str, quick: bool, folder: Path) -> dict[str, Any]:
    """A benchmark's section of the page. Raises SystemExit with its exit code where it fails."""
    command, few, title = BENCHMARKS[name]
    found, picture = folder / f"{name}.json", folder / f"{name}.svg"
    where = ["--svg", str(picture)] if name == "growth" else ["--json", str(found)]
    load, began = os.getloadavg()[0], time.monotonic()
    said = []
    print(f"\n== {title}\n", flush=True)
    call = [sys.executable, str(HERE / command[0]), *command[1:], *(few if quick else []), *where]
    with subprocess.Popen(call, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            said.append(line)
    if process.returncode:
        raise SystemExit(f"bench: expected {command[0]} to end well\n  got: exit code {process.returncode}\n"
                         f"  do:  see what it said above, or name the others: {', '.join(BENCHMARKS)}")  # fmt: skip
    figures = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else []
    return {
        "title": title,
        "lead": LEADS[name],
        "figures": [bars(one) for one in figures],
        "drawing": picture.read_text(encoding="utf-8") if picture.is_file() else "",
        "text": "".join(said),
        "about": f"{time.monotonic() - began:.0f} s; load when it began: {load:.2f}",
    }


def bars(figure: dict[str, Any]) -> dict[str, Any]:
    """Where everything of a figure stands, in its own units.

    >>> one = bars({"title": "", "unit": "ms", "note": "", "bars": [["ours", [1.0, 2.0, 4.0]]]})["rows"][0]
    >>> one["x"], one["low"], one["high"], one["text"]
    (450, 350, 650, '2')
    """
    most = max([0.0, *(high for _, (_, _, high) in figure["bars"])]) or 1.0
    least = min([0.0, *(low for _, (low, _, _) in figure["bars"])])

    def x(value: float) -> int:
        return NAMES + round((WIDE - NAMES - TAIL) * (value - least) / (most - least))

    rows = [
        {"name": name, "y": ROW * number, "x": x(middle), "low": x(low), "high": x(high),
         "text": f"{middle:.3g}" if middle < 1000 else f"{middle:,.0f}",
         "ours": name == "ours" or name.startswith(("equipoise", "the lab"))}
        for number, (name, (low, middle, high)) in enumerate(figure["bars"])
    ]  # fmt: skip
    return {**figure, "zero": x(0), "rows": rows, "high": ROW * len(rows), "wide": WIDE, "names": NAMES}


def page(sections: list[dict[str, Any]], *, quick: bool) -> str:
    """The page as text."""
    from jinja2 import ChoiceLoader, FileSystemLoader

    from equipoise.report.html.rendering import environment

    usual = environment()
    made = usual.overlay(loader=ChoiceLoader([FileSystemLoader(HERE), usual.loader]))
    facts = [machine(), versions("torch", "transformers", "equipoise"), time.strftime("%Y-%m-%d")]
    return made.get_template("bench.html.jinja").render(
        title="speed", headline="What the layer, balancing and the trainer take on this machine",
        quality="Few rounds: this shows that it works, and is no result." if quick else "",
        facts=facts, sections=sections, styles=("base", "print"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="*", help=f"{', '.join(BENCHMARKS)}; default: all of them")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    parser.add_argument("--out", type=Path, default=Path("runs/bench.html"), help="the page (default: %(default)s)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.name) - set(BENCHMARKS)):
        parser.error(f"expected {', '.join(BENCHMARKS)}, got {', '.join(unknown)}")
    folder = arguments.out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    sections = []
    for name in arguments.name or BENCHMARKS:
        sections.append(run(name, arguments.quick, folder))
        arguments.out.write_text(page(sections, quick=arguments.quick), encoding="utf-8")  # what is done is kept
    print(f"\npage: {arguments.out}")


if __name__ == "__main__":
    main()
