"""The model against published step times: table 5 of "Demons in the Detail" (arXiv 2501.11873).

A 43 B model, 6.6 B active, 160 experts, top-4, dropless, expert parallel, one sequence of 4096 tokens per GPU and
micro-batch, 512 a step. Balanced over 8 sequences a step takes 1.55 s, over 128 with a buffer 1.64 s, and 1.59 s when
1 % of the loss is added over 8 sequences. The machine, width and depth were not published: they are assumed here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .cluster import Cluster, describe
from .cost import StepTime, step_time, work
from .loads import Skew, bisect, expected_maxvio
from .straggler import Straggler, straggler
from .typical_skews import TYPICAL

__all__ = ["PAPER", "Calibration", "CalibrationRow", "calibrate", "paper_cluster"]

PAPER = {"micro": 1.55, "global": 1.64, "global+micro": 1.59}  # seconds per step
TOTAL, ACTIVE = 42.8e9, 6.6e9
EXPERTS, TOP_K, SHARED = 160, 4, 4
LAYERS, WIDTH, VOCABULARY = 48, 4096, 152_000  # assumed
LAB_GLOBAL = Skew(0.12, 0.86)  # 300 steps of the lab under a global loss


@dataclass(frozen=True)
class CalibrationRow:
    """One strategy: seconds in the paper and of the model, and the parameter ``fitted`` to make them agree."""

    name: str
    paper: float
    model: float
    fitted: str
    skew: Skew
    straggler: Straggler
    maxvio: float  # per expert, over 8 sequences: the paper's Balance BSZ


@dataclass(frozen=True)
class Calibration:
    """Table 5 as the model gives it: ``efficiency`` and two skews are fitted, the rest is predicted."""

    cluster: Cluster
    efficiency: float
    waited: float  # fraction of a balanced step that scales with the slowest rank
    rows: list[CalibrationRow]
    sums: float  # all-reduces of the balancer as a fraction of the first row: about 0.01 in the paper
    hidden: float  # cost of the last row if these were overlapped: below 0.02 in the paper
    from_lab: float  # seconds of `global` with loads of the lab: only the efficiency is fitted


def paper_cluster(gpus: int = 128) -> Cluster:
    """The model of the paper on assumed H100; total and active parameters determine the width of an expert.

    >>> paper_cluster().expert_hidden, paper_cluster().micro_batches
    (393, 4)
    """
    expert = (TOTAL - ACTIVE) / (EXPERTS + SHARED - TOP_K - SHARED)
    settings = {
        "gpus": gpus, "ep": 8, "layers": LAYERS, "experts": EXPERTS, "top_k": TOP_K, "width": WIDTH,
        "expert_hidden": round(expert / LAYERS / 3 / WIDTH), "attention_width": WIDTH,
        "dense_parameters": ACTIVE - TOP_K * expert - VOCABULARY * WIDTH, "micro_batches": 512 // gpus, "sync": "layer",
    }  # fmt: skip
    return describe(None, "h100", settings)


def calibrate(cluster: Cluster | None = None, *, seed: int = 0) -> Calibration:
    """Fits the efficiency to the first row and one skew to each other row, and predicts the rest.

    Args:
        cluster: the model and its machine; None for `paper_cluster`. seed: of the simulation.
    """
    start = cluster or paper_cluster()

    def time(on: Cluster, skew: Skew, counts: bool = True) -> StepTime:
        return step_time(on, straggler(skew, on, seed=seed), counts=counts)

    micro = TYPICAL["micro"]
    efficiency = bisect(lambda x: -time(replace(start, efficiency=x), micro, False).total, -PAPER["micro"], 0.01, 1.0)
    on = replace(start, efficiency=efficiency)
    first = time(on, micro, False)
    corpus = TYPICAL["global"].corpus

    def skew_of(name: str) -> Skew:
        return Skew(corpus, bisect(lambda x: time(on, Skew(corpus, x)).total, PAPER[name], 0.0, 4.0))

    skews = {"micro": micro, "global": skew_of("global"), "global+micro": skew_of("global+micro")}
    rows = [
        CalibrationRow(
            name=name,
            paper=PAPER[name],
            model=time(on, skew, name != "micro").total,
            fitted="efficiency" if name == "micro" else "skew of its sources",
            skew=skew,
            straggler=straggler(skew, on, seed=seed),
            maxvio=expected_maxvio(skew, EXPERTS, 8, 8 * on.tokens * TOP_K),
        )
        for name, skew in skews.items()
    ]
    sums = time(on, skews["global"]).balance_sums
    even = on.micro_batches * (work(on).dense + work(on).waited)
    return Calibration(
        cluster=on,
        efficiency=efficiency,
        waited=on.micro_batches * work(on).waited / even,
        rows=rows,
        sums=sums / first.total,
        hidden=(rows[2].model - sums) / first.total - 1,
        from_lab=time(on, LAB_GLOBAL).total,
    )
