"""A run as of one step: its evaluation, the steps before it, and only records whose shapes fit the header."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from ...storage.run_record import Evaluation, Fidelity, Header, Load, Run, Step

__all__ = ["RunView", "flatten", "last_quarter", "usable", "view_run"]


@dataclass(frozen=True)
class RunView:
    """A run as of ``step``: ``evaluation`` is the last at or before it, ``window`` the last quarter of ``steps``."""

    run: Run
    step: int
    evaluation: Evaluation | None
    steps: list[Step]
    window: list[Step]
    loads: list[Load]
    evaluations: list[Evaluation]
    fidelities: list[Fidelity]
    config: dict[str, object] = field(default_factory=dict)  # flat: "train.steps"

    @property
    def header(self) -> Header:
        return self.run.header

    @property
    def widths(self) -> list[int]:
        """Of the experts of a layer; empty where the record does not say them, as of a model that was given."""
        hidden = self.config.get("model.expert_hidden")
        if self.header.expert_widths or self.config.get("model.folder") is not None or not isinstance(hidden, int):
            return self.header.expert_widths
        return [hidden] * self.header.num_experts

    @property
    def experts_per_token(self) -> float:
        """Mean over held-out tokens and layers; NaN without an evaluation."""
        return self._per_token([1] * self.header.num_experts)

    @property
    def active_width(self) -> float:
        """Hidden units that a token's experts have together, mean over held-out tokens and layers."""
        return self._per_token(self.widths)

    def _per_token(self, costs: list[int]) -> float:
        one = self.evaluation
        if one is None or len(costs) != self.header.num_experts or not (tokens := sum(one.tokens.values())):
            return math.nan
        counts_DLE = np.array(one.counts, dtype=float)
        return float((counts_DLE * costs).sum() / (tokens * self.header.num_layers))

    def trained(self, name: str) -> float:
        """Mean over the window of one of the balancer's metrics; NaN where no step has it."""
        return mean(step.balance.get(name, math.nan) for step in self.window)

    def over_steps(self, read: Callable[[Step], float]) -> float:
        """Median over all steps, so that one slow step (a cold page cache, another process) does not matter."""
        values = [value for step in self.steps if is_number(value := read(step))]
        return float(np.median(values)) if values else math.nan


def usable(run: Run) -> tuple[list[Evaluation], list[Load], list[str]]:
    """Returns the evaluations and loads whose shapes fit the header, and a sentence for each kind that was dropped."""
    header, problems = run.header, []
    shape_LE = (header.num_layers, header.num_experts)
    shape_DLE = (len(header.domains), *shape_LE)
    names = set(header.domains)
    evaluations = [one for one in run.evaluations if _fits(one.counts, shape_DLE) and names and names <= set(one.loss)]
    if dropped := len(run.evaluations) - len(evaluations):
        problems.append(f"{dropped} evaluation(s) left out: their domains, layers or experts are not the header's")
    loads = [one for one in run.loads if _fits(one.counts, shape_LE)]
    if dropped := len(run.loads) - len(loads):
        problems.append(f"{dropped} load(s) left out: their layers or experts are not the header's")
    return evaluations, loads, problems


def view_run(run: Run, step: int | None) -> RunView:
    """``run`` at its last evaluation at or before ``step``; None for the last of all."""
    evaluations, loads, _ = usable(run)
    if step is not None:
        evaluations = [one for one in evaluations if one.step <= step]
    evaluation = max(evaluations, key=lambda one: one.step, default=None)
    steps = list({one.step: one for one in run.steps if step is None or one.step <= step}.values())
    last = evaluation.step if evaluation else max((one.step for one in steps), default=0)
    if evaluation and evaluation.step > 0:
        steps = [one for one in steps if one.step <= last]
    return RunView(run, last, evaluation, steps, last_quarter(steps), loads, evaluations, run.fidelities,
                       flatten(run.header.config))  # fmt: skip


def last_quarter(steps: list[Step]) -> list[Step]:
    """The last quarter of the steps: the routers have settled, and there are enough steps to average out the noise.

    >>> [one.step for one in last_quarter([Step(n, 1.0, 0.1, 1.0, 8, 1.0) for n in range(1, 9)])]
    [7, 8]
    """
    last = max((one.step for one in steps), default=0)
    return [one for one in steps if one.step > last - max(1, last // 4)]


def flatten(config: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Nested tables as one table with dotted names.

    >>> flatten({"model": {"width": 128}, "strategy": "micro"})
    {'model.width': 128, 'strategy': 'micro'}
    """
    flat: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def mean(values: Iterable[object]) -> float:
    """Mean of the finite numbers among ``values``; NaN if there are none."""
    numbers = [float(value) for value in values if is_number(value)]  # type: ignore[arg-type]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _fits(counts: object, shape: tuple[int, ...]) -> bool:
    try:
        array = np.asarray(counts, dtype=np.float64)
    except (ValueError, TypeError):
        return False
    return array.shape == shape and bool(np.isfinite(array).all() and (array >= 0).all())
