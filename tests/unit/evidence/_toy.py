"""A small experiment for tests: the mean of draws, of which one case is shifted; it trains nothing."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from equipoise.errors import unknown_name
from equipoise.evidence.experiment import Experiment, Outcome

SHIFTS = {"plain": 0.0, "shifted": -1.0, "slow": 0.0}


@dataclass(frozen=True, kw_only=True)
class Settings:
    draws: int = 4
    data: str | None = None


def check(case: str, settings: Settings) -> None:
    if case not in SHIFTS:
        raise unknown_name("case", case, SHIFTS)


def run(case: str, settings: Settings, seed: int, folder: Path) -> Outcome:
    (folder / "left-behind").write_text("removed with the folder")
    if case == "slow":
        time.sleep(600.0)
    draw = random.Random(seed)
    value = fmean(draw.gauss() for _ in range(settings.draws)) + SHIFTS[case]
    numbers = {"mean": value, "only shifted": -value if SHIFTS[case] else float("nan")}
    return Outcome(numbers=numbers, loss={"a": value + 3, "b": value + 4}, tokens=settings.draws)


def corpus(settings: Any, progress: Any) -> str:
    progress("looking", 1.0)
    return "t0y" if settings.data is None else "other"


EXPERIMENT = Experiment(
    settings=Settings, measures={"mean": "units", "only shifted": "units"}, check=check, corpus=corpus, run=run
)
