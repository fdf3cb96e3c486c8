"""The data of the charts: curves over steps with a band over seeds, loads of experts, shares of domains."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ...storage.run_record import Evaluation, Run, Step
from .groups import Grouping, group_load, groupings
from .run_view import RunView, is_number, mean, usable
from .statistics import paired_difference

__all__ = ["LAYER_FIELDS", "Charts", "Curve", "GroupCharts", "LoadMap", "charts", "join", "layer_values",
           "paired_series", "thin", "training_metrics"]  # fmt: skip

MOST_POINTS = 120  # of a curve: one in three pixels of a phone
MOST_LOADS = 60  # steps of a run whose expert loads are on the page
# Limits for all strategies together, which keep the page small enough to send: beyond them layers, steps and rare
# metrics are left out.
MOST_DOMAIN_CELLS = 800_000
MOST_LOAD_CELLS = 600_000
MOST_CURVES = 240
LAYER_FIELDS = ("mutual_information", "mutual_information_shuffled", "maxvio_global", "maxvio_micro_batch",
                "maxvio_sequence", "dead_experts", "routing_churn", "topk_score")  # fmt: skip


@dataclass(frozen=True)
class Curve:
    """Mean over seeds at each step. ``low`` and ``high`` are the extreme seeds, of `paired` the interval, or None."""

    steps: list[int]
    mean: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class LoadMap:
    """Load of each expert over the mean of its layer, [layer][expert]: 1 is even. ``step`` 0: held-out text."""

    step: int
    share: list[list[float]]


@dataclass(frozen=True)
class GroupCharts:
    """One grouping of the experts."""

    grouping: Grouping
    maxvio: Curve  # largest load of a group over the share that it is to have, minus 1; mean over the layers
    share: LoadMap  # the last load, [layer][group], over those shares


@dataclass(frozen=True)
class Charts:
    """What is drawn of one strategy. Maps are those of the first seed."""

    seeds: list[int] = field(default_factory=list)  # that curves are means of
    perplexity: Curve | None = None
    difference: Curve | None = None  # from the baseline's perplexity, in %, with interval; needs two seeds
    domain_perplexity: dict[str, Curve] = field(default_factory=dict)
    domain_maxvio: dict[str, Curve] = field(default_factory=dict)  # of the domain's own load, mean over the layers
    by_layer: dict[str, Curve] = field(default_factory=dict)  # one of LAYER_FIELDS -> over layers in place of steps
    groups: list[GroupCharts] = field(default_factory=list)  # of every grouping that the page knows
    grouping: Grouping | None = None  # of this strategy's own policies or routers
    training: dict[str, Curve] = field(default_factory=dict)
    relative_error: dict[str, Curve] = field(default_factory=dict)
    loads: list[LoadMap] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)  # those of ``domain_share``
    domain_share: list[list[list[float]]] = field(default_factory=list)  # [layer][domain][expert], 1 is even


def charts(
    views: Sequence[RunView],
    metrics: Sequence[str],
    strategies: int = 1,
    baseline: Sequence[Run] = (),
    known: Sequence[Grouping] = (),
) -> Charts:
    """The charts of one strategy.

    Args:
        views: its seeds. metrics: see `training_metrics`. strategies: how many share the page.
        baseline: the runs that it is compared with; empty if it is not.
        known: groupings of experts of any strategy of the page.
    """
    first, runs = views[0], [one.run for one in views]
    evaluations = [usable(run)[0] for run in runs]
    layers, share = domain_share(first, MOST_DOMAIN_CELLS // strategies)
    return Charts(
        seeds=[one.header.seed for one in views],
        perplexity=join([{one.step: one.perplexity for one in each} for each in evaluations]),
        difference=paired(runs, baseline),
        domain_perplexity=_by_domain(first, evaluations, lambda one, d: _exp(one.loss.get(first.header.domains[d]))),
        domain_maxvio=_by_domain(first, evaluations, lambda one, d: _maxvio(one.counts[d])),
        by_layer=_by_layer([one.evaluation for one in views if one.evaluation]),
        groups=[found for grouping in known if (found := _groups(views, grouping))],
        grouping=next(iter(groupings([first.header])), None),
        training={name: curve for name in metrics if (curve := binned([_series(run, name) for run in runs]))},
        relative_error={
            name: curve
            for name in sorted({name for run in runs for one in run.fidelities for name in one.relative_error})
            if (curve := join([{f.step: f.relative_error.get(name, math.nan) for f in run.fidelities} for run in runs]))
        },
        loads=load_maps(first, MOST_LOAD_CELLS // strategies),
        layers=layers,
        domain_share=share,
    )


def layer_values(evaluation: Evaluation, name: str) -> list[float]:
    """One of LAYER_FIELDS by layer; what is measured by domain, as the mean over the domains."""
    values = getattr(evaluation, name)
    if name == "topk_score":
        return [mean(of_domains) for of_domains in zip(*values, strict=False)]
    return list(values)


def _by_domain(
    first: RunView, evaluations: Sequence[Sequence[Evaluation]], read: Callable[[Evaluation, int], float]
) -> dict[str, Curve]:
    curves = {
        name: join([{one.step: read(one, d) for one in each} for each in evaluations])
        for d, name in enumerate(first.header.domains)
    }
    return {name: curve for name, curve in curves.items() if curve}


def _by_layer(evaluations: Sequence[Evaluation]) -> dict[str, Curve]:
    curves = {name: join([dict(enumerate(layer_values(one, name))) for one in evaluations]) for name in LAYER_FIELDS}
    return {name: curve for name, curve in curves.items() if curve}


def _groups(views: Sequence[RunView], grouping: Grouping) -> GroupCharts | None:
    """None where no load was recorded, or where these are groups of other experts."""
    series: list[dict[int, float]] = []
    share: LoadMap | None = None
    for one in views:
        loads = one.loads if len(grouping.order) == one.header.num_experts else []
        by_group = {load.step: group_load(load.counts, grouping) for load in loads}
        series.append({step: mean((share_LG.max(-1) - 1).tolist()) for step, share_LG in by_group.items()})
        if by_group and share is None:
            share = LoadMap(max(by_group), np.round(by_group[max(by_group)], 2).tolist())
    curve = binned(series)
    return GroupCharts(grouping, curve, share) if curve is not None and share is not None else None


def _maxvio(counts_LE: object) -> float:
    """Mean over the layers in which something was counted."""
    array = np.asarray(counts_LE, dtype=np.float64)
    average = array.mean(axis=-1)
    known = average > 0
    return float((array.max(axis=-1)[known] / average[known] - 1).mean()) if known.any() else math.nan


def training_metrics(runs: Sequence[Run], strategies: int = 1) -> list[str]:
    """Names of the metrics to draw: four of the trainer, then those of the balancer that are not of a single layer."""
    names = {name for run in runs for step in run.steps[-1:] + run.steps[:1] for name in step.balance}
    told = ("/layer_", "/signals/")  # signals are warnings: see `summarize`
    known = sorted(
        (one for one in names if not any(part in one for part in told)), key=lambda one: ("maxvio" not in one, one)
    )
    return ["loss", "lr", "grad_norm", "tokens_per_second", *known[: max(6, MOST_CURVES // strategies - 4)]]


def _series(run: Run, name: str) -> dict[int, float]:
    def read(step: Step) -> object:
        match name:
            case "loss" | "lr" | "grad_norm":
                return getattr(step, name)
            case "tokens_per_second":
                return step.tokens / step.seconds if step.seconds > 0 else math.nan
        return step.balance.get(name)

    return {step.step: float(value) for step in run.steps if is_number(value := read(step))}  # type: ignore[arg-type]


def join(seeds: Sequence[dict[int, float]]) -> Curve | None:
    """Joins the series of the seeds over the steps that all have, or that any has if they share none.

    >>> join([{1: 2.0, 2: 4.0}, {1: 4.0}])
    Curve(steps=[1], mean=[3.0], low=[2.0], high=[4.0])
    """
    seeds = [{step: value for step, value in one.items() if is_number(value)} for one in seeds]
    seeds = [one for one in seeds if one]
    if not seeds:
        return None
    common = set.intersection(*(set(one) for one in seeds)) or set.union(*(set(one) for one in seeds))
    steps = thin(sorted(common))
    columns = [[one[step] for one in seeds if step in one] for step in steps]
    if len(seeds) == 1:
        return Curve(steps, [column[0] for column in columns])
    return Curve(steps, [mean(column) for column in columns], [min(c) for c in columns], [max(c) for c in columns])


def paired(runs: Sequence[Run], baseline: Sequence[Run]) -> Curve | None:
    """Difference in perplexity at each evaluation, paired by seed, in percent, with the 95 % interval."""
    own, base = ({run.header.seed: {one.step: one.perplexity for one in usable(run)[0]} for run in group}
                 for group in (runs, baseline))  # fmt: skip
    curve = paired_series(own, base, ratio=True)
    if curve is None or curve.low is None or curve.high is None:
        return None
    mean, low, high = ([100 * value for value in part] for part in (curve.mean, curve.low, curve.high))
    return Curve(curve.steps, mean, low, high)


def paired_series(
    treated: Mapping[int, Mapping[int, float]], baseline: Mapping[int, Mapping[int, float]], *, ratio: bool = False
) -> Curve | None:
    """Treated - baseline at each step, paired by seed, with its 95 % interval; None where no step has two pairs.

    Args:
        treated, baseline: seed -> step -> value. ratio: differences are relative.

    >>> paired_series({0: {5: 3.0}, 1: {5: 3.5}}, {0: {5: 3.25}, 1: {5: 3.75}})
    Curve(steps=[5], mean=[-0.25], low=[-0.25], high=[-0.25])
    """
    found = {}
    for step in sorted({step for series in treated.values() for step in series}):
        at, base_at = ({seed: one[step] for seed, one in group.items() if step in one} for group in (treated, baseline))
        difference = paired_difference(at, base_at, ratio=ratio)
        if difference is not None and difference.low is not None and difference.high is not None:
            found[step] = (difference.mean, difference.low, difference.high)
    if not found:
        return None
    steps = thin(sorted(found))
    mean, low, high = ([found[step][part] for step in steps] for part in range(3))
    return Curve(steps, mean, low, high)


def binned(seeds: Sequence[dict[int, float]]) -> Curve | None:
    """`join` for long noisy series: each point is the mean of the steps since the previous point.

    >>> [round(one, 3) for one in binned([{step: float(step % 2) for step in range(1, 801)}]).mean[:3]]
    [0.571, 0.429, 0.571]
    """
    last = max((max(one) for one in seeds if one), default=0)
    size = max(1, math.ceil(last / MOST_POINTS))
    return join([_binned(one, size) for one in seeds])


def _binned(series: dict[int, float], size: int) -> dict[int, float]:
    bins: dict[int, list[float]] = {}
    for step, value in series.items():
        bins.setdefault(math.ceil(step / size) * size, []).append(value)
    return {step: math.fsum(values) / len(values) for step, values in bins.items()}


def load_maps(view: RunView, most_cells: int = MOST_LOAD_CELLS) -> list[LoadMap]:
    """Loads of single global batches at some steps, the last one included; without any, those of the held-out text."""
    moments = max(1, min(MOST_LOADS, most_cells // max(1, view.header.num_layers * view.header.num_experts)))
    if view.loads:
        chosen = {one.step: one for one in view.loads}
        return [LoadMap(step, _over_mean(chosen[step].counts)) for step in thin(sorted(chosen), moments)]
    if view.evaluation is None:
        return []
    return [LoadMap(0, _over_mean(np.asarray(view.evaluation.counts).sum(axis=0)))]


def domain_share(view: RunView, most_cells: int = MOST_DOMAIN_CELLS) -> tuple[list[int], list[list[list[float]]]]:
    """Layers, and [layer][domain][expert]: share of the domain's choices over the even share 1 / E."""
    if view.evaluation is None:
        return [], []
    counts_LDE = np.asarray(view.evaluation.counts, dtype=np.float64).swapaxes(0, 1)
    layers = thin(list(range(len(counts_LDE))), max(1, most_cells // max(1, counts_LDE[0].size)))
    return layers, [_over_mean(counts_LDE[layer]) for layer in layers]


def _over_mean(counts_XE: object) -> list[list[float]]:
    array = np.asarray(counts_XE, dtype=np.float64)
    average = array.mean(axis=-1, keepdims=True)
    return np.round(array / np.where(average > 0, average, 1.0), 2).tolist()


def thin(items: list[int], most: int = MOST_POINTS) -> list[int]:
    """At most ``most`` of the items, evenly spaced; keeps the first and the last.

    >>> thin(list(range(10)), 4)
    [0, 3, 6, 9]
    """
    if len(items) <= most:
        return items
    if most == 1:
        return items[-1:]
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def _exp(loss: float | None) -> float:
    return math.exp(loss) if loss is not None and loss < 700 else math.nan
