"""How large a page of the largest models is, and how long it takes to write and to open: at most 8 MB and 6 s.

    python benchmarks/report_size.py                 # about a minute
    python benchmarks/report_size.py --layers 2 --experts 8 --domains 6

Made-up records of 48 layers x 128 experts x 12 domains, shaped like those of the lab and of `equipoise inspect`, and
written to a folder as these write them. "comparison": 4 strategies x 3 seeds of 150 steps; "inspection": one model;
"training": 8 checkpoints of it; "all": the comparison and the checkpoints on one page.

write s: from the files to the finished page, CPU time of this process; median and quartiles of the rounds. open s: from
the start of loading the file in Chromium until its last figure is drawn, wall time; "-" without Playwright or a
browser. An "!" marks what is above its bound; then the exit status is 1.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from _report import machine, span, versions

from equipoise.errors import ConfigError, OutputError
from equipoise.report.export.browser import in_browser
from equipoise.report.export.outputs import read_report
from equipoise.storage.inspection_record import write_inspection

MEGABYTES, SECONDS = 8.0, 6.0
DRAWN = "performance.now()"  # asked for at the moment when the page says that it is drawn
MADE_UP = Path(__file__).resolve().parents[1] / "tests"


@dataclass(frozen=True)
class Sizes:
    layers: int = 48
    experts: int = 128
    domains: int = 12
    seeds: int = 3
    steps: int = 150
    checkpoints: int = 8


@dataclass(frozen=True)
class Found:
    name: str
    megabytes: float
    write: list[float]  # seconds, a number a round
    open: float | None  # seconds; None where nothing can open it

    @property
    def above(self) -> bool:
        return self.megabytes > MEGABYTES or min(self.write) > SECONDS or (self.open or 0) > SECONDS


def make(folder: Path, sizes: Sizes) -> dict[str, list[Path]]:
    """Writes the records; for each case the folders that its report is made of."""
    sys.path.insert(0, str(MADE_UP))
    runs = importlib.import_module("unit.report.synthetic")
    looks = importlib.import_module("unit.report.synthetic_inspection")
    names = [f"domain {i}" for i in range(sizes.domains)]
    shape = {"layers": sizes.layers, "experts": sizes.experts}
    runs.write_comparison(folder / "runs", seeds=sizes.seeds, steps=sizes.steps, domains=names, **shape)
    steps = [1000 * (1 + number) for number in range(sizes.checkpoints)]
    checkpoints = looks.synthetic_checkpoints(steps, names=names, top_k=min(8, sizes.experts // 2), **shape)
    folders = [folder / f"step-{step}" for step in steps]
    for place, one in zip(folders, checkpoints, strict=True):
        write_inspection(place, one)
    return {"comparison": [folder / "runs"], "inspection": folders[:1], "training": folders,
            "all": [folder / "runs", *folders]}  # fmt: skip


def measure(name: str, paths: Sequence[Path], rounds: int, opened: Callable[[str], float | None]) -> Found:
    times, page = [], ""
    for _ in range(rounds):
        began = time.process_time()
        page = read_report(paths).html()
        times.append(time.process_time() - began)
    return Found(name, len(page.encode()) / 1e6, times, opened(page))


def seconds_to_open(page: str) -> float | None:
    try:
        return in_browser(page, lambda opened: opened.evaluate(DRAWN)) / 1e3
    except ConfigError:  # no Playwright, no browser
        return None
    except OutputError as error:
        print(f"not drawn in time: {error.got}", file=sys.stderr)
        return float("inf")


def table(found: Sequence[Found]) -> str:
    lines = [f"{'page':<12}{'MB':>8}{'write s':>20}{'open s':>10}"]
    for one in found:
        opened = "-" if one.open is None else f"{one.open:.1f}"
        lines.append(f"{one.name:<12}{one.megabytes:>8.2f}{span(one.write):>20}{opened:>10}{' !' * one.above}")
    return "\n".join([*lines, f"bounds{'':<6}{MEGABYTES:>8.2f}{SECONDS:>20.1f}{SECONDS:>10.1f}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    for name, default in (("layers", 48), ("experts", 128), ("domains", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    sizes = Sizes(args.layers, args.experts, args.domains)
    print(machine(), versions("equipoise", "numpy", "plotly", "jinja2", "playwright"), sep="\n")
    print(f"{sizes.layers} layers x {sizes.experts} experts x {sizes.domains} domains\n")
    with tempfile.TemporaryDirectory() as folder:
        cases = make(Path(folder), sizes)
        found = [measure(name, paths, args.rounds, seconds_to_open) for name, paths in cases.items()]
    print(table(found))
    return int(any(one.above for one in found))


if __name__ == "__main__":
    sys.exit(main())
