"""What fusion runs say of their strategies: losses by modality, paired by seed, and who computes which modality."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...report.data.formatting import listed, signed
from ...report.data.statistics import Difference, Estimate, estimate, paired_difference
from ...storage.run_record import Evaluation, Run
from ..comparison.last_evaluations import last_evaluations, read_small_runs
from ..config.loading import from_dict
from .config import FusionConfig
from .numbers import MEASURES, numbers_of
from .strategies import BASELINE, MODALITIES, read_strategy
from .trainer import TASK

__all__ = ["Compared", "StrategySummary", "read_runs", "summarize"]


@dataclass(frozen=True)
class StrategySummary:
    """All evaluated runs of one strategy. ``differences`` of losses are from the baseline, None for itself.

    Args:
        numbers: of `MEASURES`, over seeds.
        share: [layer][modality][expert] of the first seed: share of the modality's choices, over the even share of all.
    """

    name: str
    runs: list[Run]
    numbers: dict[str, Estimate]
    differences: dict[str, Difference | None]
    share: list[list[list[float]]]

    def mean(self, name: str) -> float:
        return self.numbers[name].mean


@dataclass(frozen=True)
class Compared:
    """Strategies in their order."""

    strategies: list[StrategySummary]
    baseline: str
    step: int
    problems: list[str]

    @property
    def headline(self) -> str:
        """Which strategies differ from the baseline for certain, by modality."""
        parts = []
        for name in MODALITIES:
            known = [(one.name, one.differences[name]) for one in self.strategies]
            clear = [f"{other} {'lower' if d.mean < 0 else 'higher'}, {_interval(d)}" for other, d in known
                     if d and d.is_clear]  # fmt: skip
            open_ = [other for other, d in known if d and not d.is_clear]
            if open_:
                clear.append(f"{listed(open_)} not told apart")
            parts.append(f"{name}: {'; '.join(clear)}" if clear else "")
        if not any(parts):
            return "Held-out nats per token: " + listed(
                [f"{one.name} {one.mean('loss text'):.3f} text, {one.mean('loss image'):.3f} image"
                 for one in self.strategies]) + "."  # fmt: skip
        return f"Held-out loss against {self.baseline}. {'. '.join(part.capitalize() for part in parts if part)}."


def read_runs(folder: Path, first: Sequence[str] = ()) -> list[Run]:
    """The fusion runs in the folders of ``folder``, those of the strategies in ``first`` before others.

    Raises DataError where there are none.
    """
    return read_small_runs(folder, first, TASK, "fuse")


def summarize(runs: Sequence[Run], baseline: str | None = None) -> Compared:
    """Compares runs at their last evaluation; those of fewer steps than the longest are named and left out.

    Args:
        baseline: a strategy; by default "mixed", where it is among them, else the first.

    Raises DataError where no run was evaluated.
    """
    found = last_evaluations(runs)
    known = found.baseline(baseline, BASELINE)
    base = _by_seed(found.by_name[known])
    strategies = [_summary(name, pairs, base if name != known else {}) for name, pairs in found.by_name.items()]
    return Compared(strategies, known, found.step, found.problems)


def _by_seed(pairs: Sequence[tuple[Run, Evaluation]]) -> dict[int, dict[str, float]]:
    return {run.header.seed: numbers_of(one, _open_to(run)) for run, one in pairs}


def _open_to(run: Run) -> tuple[range, range]:
    return read_strategy(run.header.strategy).open_to(from_dict(FusionConfig, run.header.config).model)


def _summary(
    name: str, pairs: Sequence[tuple[Run, Evaluation]], base: Mapping[int, Mapping[str, float]]
) -> StrategySummary:
    own = _by_seed(pairs)

    def seeds(of: Mapping[int, Mapping[str, float]], measure: str) -> dict[int, float]:
        return {seed: numbers[measure] for seed, numbers in of.items()}

    nothing = Estimate(math.nan, math.nan, math.nan, 0, {})
    counts_DLE = np.asarray(pairs[0][1].counts, dtype=np.float64)
    shares_DLE = counts_DLE / np.maximum(counts_DLE.sum(axis=2, keepdims=True), 1) * counts_DLE.shape[2]
    return StrategySummary(
        name=name,
        runs=[run for run, _ in pairs],
        numbers={measure: estimate(seeds(own, measure)) or nothing for measure in MEASURES},
        differences={
            of: paired_difference(seeds(own, f"loss {of}"), seeds(base, f"loss {of}")) if base else None
            for of in MODALITIES
        },
        share=shares_DLE.swapaxes(0, 1).tolist(),
    )


def _interval(difference: Difference) -> str:
    low, high = (signed(one, 3) for one in (difference.low, difference.high))
    return f"{signed(difference.mean, 3)} [{low}, {high}]"
