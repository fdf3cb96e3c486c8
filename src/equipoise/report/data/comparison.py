"""The numbers of a comparison as plain dataclasses: what the terminal, the page, the CSV and JSON all show."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .curves import Charts
from .statistics import Difference, Estimate

__all__ = ["Comparison", "EstimatorSummary", "RunFacts", "StrategySummary"]


@dataclass(frozen=True)
class RunFacts:
    """One run of a strategy. ``step`` is the last one it trained, ``seen_at`` the one its numbers are of."""

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
    """Gradient of the balance loss with this f against the exact one: means over all steps at which it was measured."""

    name: str
    relative_error: float
    cosine: float
    in_use: bool
    n: int


@dataclass(frozen=True)
class StrategySummary:
    """All runs of one strategy. ``differences`` are against the baseline, empty for the baseline itself."""

    name: str
    policies: list[str]
    runs: list[RunFacts]
    compared: bool  # its numbers are of the same step as the others'
    values: dict[str, Estimate | None]
    differences: dict[str, Difference | None]
    domain_perplexity: dict[str, Estimate | None]
    domain_bits: dict[str, Estimate | None]
    domain_differences: dict[str, Difference | None]
    layers: dict[str, list[float]]  # field of the evaluation -> mean over seeds, by layer
    estimators: list[EstimatorSummary]
    charts: Charts


@dataclass(frozen=True)
class Comparison:
    """What a report says. ``step`` is None when the strategies have no evaluated step in common."""

    headline: str  # what is certain: the experts and their load
    quality: str  # perplexity: who is told apart; may be empty
    baseline: str
    step: int | None
    strategies: list[StrategySummary]
    warnings: list[str]
    problems: list[str]
    domains: list[str]
    noise_floor: dict[str, float]  # column -> MaxVio of uniformly random routing
    facts: dict[str, Any] = field(default_factory=dict)  # layers, experts, parameters, tokens per step, ...
    config: dict[str, Any] = field(default_factory=dict)  # flat, of the baseline's first run
    corpora: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> StrategySummary:
        return next(one for one in self.strategies if one.name == name)
