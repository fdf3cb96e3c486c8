"""The numbers of a comparison as plain dataclasses: what the terminal, the page, the CSV and JSON all show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .curves import Charts
from .statistics import Difference, Estimate

__all__ = ["Comparison", "EstimatorSummary", "RunFacts", "StrategySummary"]


@dataclass(frozen=True)
class RunFacts:
    """One run of a strategy. ``step`` is the last one trained, ``seen_at`` the one that its numbers are from."""

    path: str
    seed: int
    status: str
    step: int
    planned_steps: int | None
    seen_at: int
    tokens: int
    seconds: float
    started: str
    message: str
    problems: list[str]


@dataclass(frozen=True)
class EstimatorSummary:
    """Gradient of the balance loss with an estimated f against the exact one, averaged over the steps measured."""

    name: str
    relative_error: float
    cosine: float
    in_use: bool
    n: int


@dataclass(frozen=True)
class StrategySummary:
    """All runs of one strategy. ``differences`` are from the baseline, and empty for the baseline itself."""

    name: str
    policies: list[str]
    runs: list[RunFacts]
    compared: bool  # its numbers are from the same step as those of the others
    values: dict[str, Estimate | None]
    differences: dict[str, Difference | None]
    domain_perplexity: dict[str, Estimate | None]
    domain_bits: dict[str, Estimate | None]
    domain_differences: dict[str, Difference | None]
    tenth_losses: dict[str, list[Estimate | None]]  # "input", "target" -> loss by tenth of the text, as `Evaluation`'s
    tenth_differences: dict[str, list[Difference | None]]
    layers: dict[str, list[float]]  # field of the evaluation -> mean over seeds, by layer
    estimators: list[EstimatorSummary]
    charts: Charts
    load_by_width: dict[int, float] = field(default_factory=dict)  # over the even load; empty where all are alike


@dataclass(frozen=True)
class Comparison:
    """The numbers of a report. ``step`` is None if the strategies share no evaluated step."""

    headline: str  # what is certain: specialization and load
    quality: str  # perplexity, and which differences are significant; may be empty
    baseline: str
    step: int | None
    strategies: list[StrategySummary]
    warnings: list[str]
    problems: list[str]
    domains: list[str]
    noise_floor: dict[str, float]  # column -> MaxVio of uniformly random routing
    facts: dict[str, Any] = field(default_factory=dict)  # layers, experts, parameters, tokens per step, ...
    config: dict[str, Any] = field(default_factory=dict)  # dotted names, from the first run of the baseline
    corpora: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> StrategySummary:
        return next(one for one in self.strategies if one.name == name)
