"""What lies behind a contrast: its two sides over the steps, and each domain of the text. Shown, never judged."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import stdev

from ..report.data.curves import Curve, join, paired_series
from ..report.data.statistics import Difference, paired_difference
from .power import PAIRS, detectable
from .run_summary import RunSummary
from .verdict import ClaimVerdict, Judged

__all__ = ["Noise", "Steps", "by_domain", "core_hours", "distinct_runs", "noise", "over_steps"]


@dataclass(frozen=True)
class Noise:
    """How much a difference in held-out loss varies from seed to seed, and what `PAIRS` seeds see of it."""

    where: str
    pair: str
    pairs: int
    sd: float  # of the differences, in nats per token
    sees: list[float]  # smallest mean difference that is told from zero four times in five; NaN where sd is 0


@dataclass(frozen=True)
class Steps:
    """Both sides over the steps: means and extremes of the seeds, of ``difference`` the 95 % interval."""

    loss: dict[str, Curve | None]  # "treated", "baseline" -> held-out loss in nats per token
    maxvio: dict[str, Curve | None]  # of the training steps
    difference: Curve | None  # in held-out loss, paired by seed; needs two pairs


def by_domain(judged: Judged) -> dict[str, Difference]:
    """Treated - baseline in held-out loss (nats per token) in each domain, paired by seed, in the order of the runs.

    The intervals are single ones: nothing is corrected for their number.
    """
    treated, baseline = _pairs(judged)
    names = dict.fromkeys(name for run in treated.values() for name in run.loss)
    found = {
        name: paired_difference(*({seed: run.loss[name] for seed, run in side.items() if name in run.loss}
                                  for side in (treated, baseline)))
        for name in names
    }  # fmt: skip
    return {name: difference for name, difference in found.items() if difference is not None}


def over_steps(judged: Judged) -> Steps:
    """The curves of the seeds that both sides have."""
    sides = dict(zip(("treated", "baseline"), _pairs(judged), strict=True))
    loss = {side: {seed: _series(run.evaluations, 1) for seed, run in runs.items()} for side, runs in sides.items()}
    maxvio = {side: [_series(run.trail, 2) for run in runs.values()] for side, runs in sides.items()}
    return Steps(
        loss={side: join(list(of_seeds.values())) for side, of_seeds in loss.items()},
        maxvio={side: join(of_seeds) for side, of_seeds in maxvio.items()},
        difference=paired_series(loss["treated"], loss["baseline"]),
    )


def noise(judged: Sequence[ClaimVerdict]) -> list[Noise]:
    """Of every contrast in loss with three pairs or more, each cell once."""
    found: dict[tuple[str, str], Noise] = {}
    for one in (j for of_claim in judged for j in of_claim.judged):
        contrast, difference = one.contrast, one.difference
        at = contrast.cell, f"{contrast.treated} - {contrast.baseline}"
        if contrast.measure == "loss" and difference is not None and difference.n >= 3 and at not in found:
            sd = stdev(difference.by_seed.values())
            sees = [detectable(sd, pairs) if sd > 0 else math.nan for pairs in PAIRS]
            found[at] = Noise(*at, difference.n, sd, sees)
    return list(found.values())


def core_hours(judged: Sequence[ClaimVerdict]) -> float:
    """Of `distinct_runs`; a run uses one core."""
    return math.fsum(run.seconds for run in distinct_runs(judged).values() if math.isfinite(run.seconds)) / 3600


def distinct_runs(judged: Sequence[ClaimVerdict]) -> dict[tuple[str, int, str], RunSummary]:
    """The runs behind these claims by key, seed and text: each once, however many claims share it."""
    return {
        (run.key, run.seed, run.corpus): run
        for of_claim in judged
        for one in of_claim.judged
        for of_side in one.runs.values()
        for run in of_side.values()
    }


def _pairs(judged: Judged) -> tuple[dict[int, RunSummary], dict[int, RunSummary]]:
    """Treated and baseline runs of the seeds that both have and that did not diverge."""
    treated, baseline = judged.runs["treated"], judged.runs["baseline"]
    seeds = [
        seed
        for seed in sorted(treated.keys() & baseline.keys())
        if treated[seed].status == baseline[seed].status == "finished"
    ]
    return {seed: treated[seed] for seed in seeds}, {seed: baseline[seed] for seed in seeds}


def _series(rows: Sequence[Sequence[float]], column: int) -> dict[int, float]:
    return {int(row[0]): row[column] for row in rows}
