"""What diffusion runs say of their strategies: errors by noise level, paired by seed, and who computes which level."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...report.data.formatting import listed, signed
from ...report.data.run_view import mean
from ...report.data.statistics import Difference, Estimate, estimate, paired_difference
from ...storage.run_record import Evaluation, Run
from ..comparison.last_evaluations import last_evaluations, read_small_runs
from .strategies import BASELINE

__all__ = ["Compared", "StrategySummary", "read_runs", "summarize"]


@dataclass(frozen=True)
class StrategySummary:
    """All evaluated runs of one strategy. ``differences`` are from the baseline, empty for the baseline itself.

    Args:
        loss: squared error of the velocity per pixel, mean over the noise levels; ``by_level`` of each.
        experts_per_token: by noise level, mean over layers and seeds.
        information: nats between expert and noise level, mean over layers; ``maxvio`` of all held-out tokens.
        share: [layer][level][expert] of the first seed: share of the level's tokens, over the even share C / E.
    """

    name: str
    runs: list[Run]
    loss: Estimate
    by_level: list[Estimate]
    difference: Difference | None
    level_differences: list[Difference | None]
    experts_per_token: list[float]
    information: Estimate
    maxvio: Estimate
    maxvio_sequence: Estimate
    share: list[list[list[float]]]


@dataclass(frozen=True)
class Compared:
    """Strategies in their order; ``levels`` are the middles of the intervals of noise levels."""

    strategies: list[StrategySummary]
    baseline: str
    levels: list[float]
    step: int
    problems: list[str]

    @property
    def headline(self) -> str:
        """Which strategies differ from the baseline for certain."""
        clear = [one for one in self.strategies if one.difference and one.difference.is_clear]
        others = [one.name for one in self.strategies if one.difference and not one.difference.is_clear]
        if not clear and not others:
            return f"Held-out error of the flow: {listed([_error(one) for one in self.strategies])}."
        said = [f"{one.name} {'lower' if one.difference.mean < 0 else 'higher'}, {_interval(one.difference)}"
                for one in clear if one.difference]  # fmt: skip
        if others:
            said.append(f"{listed(others)} not told apart")
        return f"Held-out error of the flow against {self.baseline}: {'; '.join(said)}."


def read_runs(folder: Path, first: Sequence[str] = ()) -> list[Run]:
    """The diffusion runs in the folders of ``folder``, those of the strategies in ``first`` before others.

    Raises DataError where there are none.
    """
    return read_small_runs(folder, first, "images", "diffuse")


def summarize(runs: Sequence[Run], baseline: str | None = None) -> Compared:
    """Compares runs at their last evaluation; those of fewer steps than the longest are named and left out.

    Args:
        baseline: a strategy; by default "sample", where it is among them, else the first.

    Raises DataError where no run was evaluated; ConfigError for a baseline that none of the compared runs is of.
    """
    found = last_evaluations(runs)
    known, by_name = found.baseline(baseline, BASELINE), found.by_name
    base = by_name[known]
    levels = list(base[0][1].loss)
    strategies = [_summary(name, pairs, base if name != known else [], levels) for name, pairs in by_name.items()]
    return Compared(strategies, known, [float(level) for level in levels], found.step, found.problems)


def _summary(
    name: str,
    pairs: Sequence[tuple[Run, Evaluation]],
    base: Sequence[tuple[Run, Evaluation]],
    levels: Sequence[str],
) -> StrategySummary:
    def seeds(of: Sequence[tuple[Run, Evaluation]], read: Callable[[Evaluation], float]) -> Mapping[int, float]:
        return {run.header.seed: read(one) for run, one in of}

    def known(read: Callable[[Evaluation], float]) -> Estimate:
        return estimate(seeds(pairs, read)) or Estimate(math.nan, math.nan, math.nan, 0, {})

    def against(read: Callable[[Evaluation], float]) -> Difference | None:
        return paired_difference(seeds(pairs, read), seeds(base, read)) if base else None

    reads = [lambda one, level=level: one.loss.get(level, math.nan) for level in levels]
    run, first = pairs[0]
    even = float(run.header.config["model"]["capacity"]) / run.header.num_experts if run.header.num_experts > 1 else 1.0
    shares = np.asarray(first.counts) / np.maximum(np.array(list(first.tokens.values()))[:, None, None], 1)
    return StrategySummary(
        name=name,
        runs=[run for run, _ in pairs],
        loss=known(lambda one: one.mean_loss),
        by_level=[known(read) for read in reads],
        difference=against(lambda one: one.mean_loss),
        level_differences=[against(read) for read in reads],
        experts_per_token=np.mean([_experts_per_token(one) for _, one in pairs], axis=0).tolist(),
        information=known(lambda one: mean(one.mutual_information)),
        maxvio=known(lambda one: mean(one.maxvio_global)),
        maxvio_sequence=known(lambda one: mean(one.maxvio_sequence)),
        share=(shares.swapaxes(0, 1) / even).tolist(),
    )


def _experts_per_token(one: Evaluation) -> list[float]:
    """By noise level, mean over layers."""
    counts_DLE, tokens_D = np.asarray(one.counts, dtype=np.float64), np.array(list(one.tokens.values()))
    return (counts_DLE.sum(axis=2).mean(axis=1) / np.maximum(tokens_D, 1)).tolist()


def _error(one: StrategySummary) -> str:
    return f"{one.name} {one.loss.mean:.4f}"


def _interval(difference: Difference) -> str:
    low, high = (signed(one, 4) for one in (difference.low, difference.high))
    return f"{signed(difference.mean, 4)} [{low}, {high}]"
