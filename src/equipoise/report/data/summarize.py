"""Summarizes run records as a comparison: groups runs by strategy and takes means and paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from ...errors import ConfigError, unknown_name
from ...storage.codec import without_nan
from ...storage.run_record import Run
from . import comparability
from .comparison import Comparison, EstimatorSummary, RunFacts, StrategySummary
from .comparison_columns import COMPARISON_COLUMNS
from .curves import LAYER_FIELDS, charts, layer_values, training_metrics
from .formatting import clean, listed
from .groups import Grouping, groupings
from .headline import headline
from .order_statistics import random_maxvio
from .run_view import RunView, is_number, mean, usable, view_run
from .statistics import estimate, paired_difference

__all__ = ["summarize", "to_json"]

SIGNALS = "balance/signals/"
# Of the choices in a layer, between the last two evaluations. Measured on default runs (240 steps, evaluated every 60),
# in each of two layers, two seeds: global+micro 0.08 to 0.10, micro 0.09 to 0.14, loss-free 0.07 to 0.09; where the
# learning rate does not fall, 0.20 to 0.22. Choices by chance: 0.75.
UNSETTLED = 0.2
UNEVEN = 1.0  # MaxVio: an expert with twice its share
SIDES = ("input", "target")  # whether the token that is read, or the one that is predicted, is rare or frequent
PREFERRED_BASELINE = "micro"  # the usual choice: differences read as what switching away from it changes


def summarize(runs: Sequence[Run], *, baseline: str | None = None, problems: Sequence[str] = ()) -> Comparison:
    """Groups runs by strategy and settings (the seeds) and compares the groups with ``baseline``.

    Args:
        runs: in the order in which strategies are to be shown.
        baseline: a strategy; None takes ``micro`` if it is there, else the first.
        problems: sentences about files that could not be read, shown with those found in ``runs``.

    Raises ConfigError if there is no run, or none of the baseline.
    """
    if not runs:
        raise ConfigError(expected="at least one run", got="none", do="pass the folder of a run or of a comparison")
    warnings: list[str] = []
    groups = _group(runs, warnings)
    baseline = _baseline(groups, baseline)
    every = [run for group in groups.values() for run in group]
    found, same_text, others = comparability.compare_settings(groups)
    evaluated = [[one.step for one in usable(run)[0]] for run in every]
    step, about_steps = comparability.common_step(every, evaluated)
    warnings += found + about_steps
    views = {label: [view_run(run, step) for run in group] for label, group in groups.items()}
    metrics = training_metrics(every, len(groups))
    known = groupings(run.header for run in every)
    strategies = [_strategy(label, views, baseline, step, same_text, metrics, known) for label in groups]
    strategies = sorted(strategies, key=lambda one: one.name != baseline)  # the baseline first, the rest as they came
    for one in strategies:
        if not one.compared and step is not None:
            warnings.append(f"{clean(one.name)} was not evaluated at step {step}: it is shown, not compared.")
        elif late := [str(run.seed) for run in one.runs if step is not None and run.seen_at != step]:
            seeds = f"seed {late[0]} was" if len(late) == 1 else f"seeds {listed(late)} were"
            warnings.append(f"{clean(one.name)}: {seeds} not evaluated at step {step} and left out.")
    warnings += [line for label, group in groups.items() for line in _signals(label, group)]
    warnings += _still_uneven(strategies)
    first = views[baseline][0]
    certain, quality = headline(strategies, baseline, step, same_text, others, first.config)
    return Comparison(
        headline=certain,
        quality=quality,
        baseline=baseline,
        step=step,
        strategies=strategies,
        warnings=warnings,
        problems=[*problems, *_problems(every)],
        domains=list(dict.fromkeys(name for one in strategies for name in one.domain_perplexity)),
        noise_floor=_noise_floor(first),
        facts=_facts(first),
        config=first.config,
        corpora=list(dict.fromkeys(run.header.corpus_sha256 for run in every)),
        versions=first.header.versions,
    )


def to_json(comparison: Comparison) -> dict[str, Any]:
    """The numbers without the data of the charts; NaN becomes None."""
    data = asdict(comparison)
    for strategy in data["strategies"]:
        del strategy["charts"]
    return without_nan(data)


def _group(runs: Sequence[Run], warnings: list[str]) -> dict[str, list[Run]]:
    """Runs by label: the name of the strategy, and the settings that differ if it was run with several."""
    found: dict[str, dict[tuple, list[Run]]] = {}
    for run in runs:
        found.setdefault(run.header.strategy, {}).setdefault(comparability.settings_key(run), []).append(run)
    groups: dict[str, list[Run]] = {}
    for name, variants in found.items():
        unlike = comparability.differing(run for group in variants.values() for run in group)
        for number, group in enumerate(variants.values(), start=1):
            label = name
            if len(variants) > 1:
                own = comparability.settings(group[0])
                told = ", ".join(f"{key.rpartition('.')[2]}={own.get(key, 'not set')}" for key in unlike)
                label = f"{name} ({told})" if len(unlike) <= 2 and len(told) <= 32 else f"{name} #{number}"
            groups[label] = _one_per_seed(label, group, warnings)
    return groups


def _one_per_seed(label: str, group: list[Run], warnings: list[str]) -> list[Run]:
    """Of runs with the same seed keeps the longest, of equally long ones the latest."""
    best: dict[int, Run] = {}
    for run in group:
        other = best.get(run.header.seed)
        if other is None or (_reached(run), run.header.started) >= (_reached(other), other.header.started):
            best[run.header.seed] = run
    if left := len(group) - len(best):
        warnings.append(f"{clean(label)}: {left} run(s) left out that repeat a seed; the longest of each is used.")
    return [best[seed] for seed in sorted(best)]


def _reached(run: Run) -> int:
    return max((step.step for step in run.steps), default=0)


def _baseline(groups: Mapping[str, object], wanted: str | None) -> str:
    if wanted is not None and wanted not in groups:
        raise unknown_name("strategy of these runs", wanted, groups)
    return wanted or (PREFERRED_BASELINE if PREFERRED_BASELINE in groups else next(iter(groups)))


def _signals(label: str, runs: Sequence[Run]) -> list[str]:
    """What the last step of a run shows, and its last evaluation, where most seeds do."""
    last = [run.steps[-1].balance for run in runs if run.steps]
    names = dict.fromkeys(name for one in last for name in one if name.startswith(SIGNALS))
    shown = {name.removeprefix(SIGNALS): [one.get(name, 0.0) for one in last] for name in names}
    churns = [run.evaluations[-1].routing_churn for run in runs if run.evaluations]
    shown["routing_churn"] = [sum(share > UNSETTLED for share in of_layers) for of_layers in churns]
    lines = []
    for name, of_seeds in shown.items():
        layers = [number for number in of_seeds if is_number(number) and number > 0]
        if 2 * len(layers) > len(of_seeds):
            lines.append(
                f"{clean(label)} ended with the signal {clean(name)} in "
                f"{max(layers):.0f} layer{'s' * (max(layers) > 1)} ({len(layers)} of {len(of_seeds)} seeds): "
                "docs/measures.md says what it means and what helps."
            )
    return lines


def _still_uneven(strategies: Sequence[StrategySummary]) -> list[str]:
    """Of strategies that balance: experts that got to know domains before anything was even may unlearn it again."""
    found = [(one, one.values["heldout_maxvio_global"]) for one in strategies if one.policies]
    return [
        f"{clean(one.name)} has not balanced yet: its fullest expert has {1 + maxvio.mean:.1f} times an even share of "
        "held-out text. What its experts tell apart may change with more steps, or a larger rate or coefficient."
        for one, maxvio in found
        if maxvio is not None and maxvio.mean >= UNEVEN
    ]


def _strategy(
    label: str,
    views: Mapping[str, list[RunView]],
    baseline: str,
    step: int | None,
    same_text: bool,
    metrics: list[str],
    known: list[Grouping],
) -> StrategySummary:
    own = views[label]
    at, base_at = (
        [one for one in group if step is None or (one.evaluation is not None and one.evaluation.step == step)]
        for group in (own, views[baseline])
    )
    compare = same_text and step is not None and label != baseline
    against = [one.run for one in views[baseline]] if compare else []
    shown = at or own
    values, differences = {}, {}
    for column in COMPARISON_COLUMNS:
        by_seed = {one.header.seed: column.read(one) for one in shown}
        values[column.key] = estimate(by_seed, ratio=column.ratio)
        if compare and at:
            base = {one.header.seed: column.read(one) for one in base_at}
            differences[column.key] = paired_difference(by_seed, base, ratio=column.ratio)
    names = own[0].header.domains
    return StrategySummary(
        name=label,
        policies=own[0].header.policies,
        runs=[_run_facts(one) for one in own],
        compared=bool(at),
        values=values,
        differences=differences,
        domain_perplexity={name: estimate(_domain(shown, name, "loss"), ratio=True) for name in names},
        domain_bits={name: estimate(_domain(shown, name, "bits_per_byte")) for name in names},
        domain_differences={
            name: paired_difference(_domain(at, name, "loss"), _domain(base_at, name, "loss"), ratio=True)
            for name in names
            if compare
        },
        tenth_losses={side: [estimate(each) for each in _tenths(shown, side)] for side in SIDES},
        tenth_differences={
            side: [paired_difference(*pair) for pair in zip(_tenths(at, side), _tenths(base_at, side), strict=False)]
            for side in SIDES
            if compare
        },
        layers=_layers(shown),
        estimators=_estimators(own),
        charts=charts(shown, metrics, len(views), against, known),
        load_by_width=_load_by_width(shown),
    )


def _domain(views: Sequence[RunView], name: str, field_name: str) -> dict[int, float]:
    """Seed -> bits per byte of one domain, or its perplexity for ``loss``."""
    evaluated = [(one.header.seed, one.evaluation) for one in views if one.evaluation]
    values = {seed: getattr(one, field_name).get(name, math.nan) for seed, one in evaluated}
    if field_name != "loss":
        return values
    return {seed: math.exp(loss) if loss < 700 else math.inf for seed, loss in values.items()}


def _tenths(views: Sequence[RunView], side: str) -> list[dict[int, float]]:
    """Of each tenth of the text: seed -> loss. Empty where no run has it."""
    found = {one.header.seed: one.evaluation.loss_by_frequency.get(side, []) for one in views if one.evaluation}
    return [
        {seed: of[i] for seed, of in found.items() if len(of) > i}
        for i in range(max(map(len, found.values()), default=0))
    ]


def _layers(views: Sequence[RunView]) -> dict[str, list[float]]:
    """Means over the seeds, by layer."""
    evaluations = [one.evaluation for one in views if one.evaluation]
    if not evaluations:
        return {}
    layers = range(len(evaluations[0].counts[0]))
    values = {name: [layer_values(one, name) for one in evaluations] for name in LAYER_FIELDS}
    return {
        name: [mean(values[layer] for values in of_seeds if len(values) > layer) for layer in layers]
        for name, of_seeds in values.items()
    }


def _load_by_width(views: Sequence[RunView]) -> dict[int, float]:
    """Width -> load of such an expert over the even one, mean over experts, layers and seeds, of held-out text."""
    loads: dict[int, list[float]] = {}
    for view in views:
        if view.evaluation is None:
            continue
        for counts_E in np.array(view.evaluation.counts, dtype=float).sum(axis=0):
            even = counts_E.mean()
            for width, count in zip(view.header.expert_widths, counts_E, strict=False):
                loads.setdefault(width, []).append(float(count / even) if even else math.nan)
    return {width: mean(loads[width]) for width in sorted(loads)}


def _estimators(views: Sequence[RunView]) -> list[EstimatorSummary]:
    all_of_them = [one for view in views for one in view.fidelities]
    names = sorted({name for one in all_of_them for name in one.relative_error})
    return [
        EstimatorSummary(
            name=name,
            relative_error=mean(one.relative_error.get(name, math.nan) for one in all_of_them),
            cosine=mean(one.cosine.get(name, math.nan) for one in all_of_them),
            in_use=any(name in one.in_use for one in all_of_them),
            n=sum(name in one.relative_error for one in all_of_them),
        )
        for name in names
    ]


def _run_facts(view: RunView) -> RunFacts:
    run = view.run
    planned = view.config.get("train.steps")
    return RunFacts(
        path=str(run.path),
        seed=run.header.seed,
        status=run.status,
        step=_reached(run),
        planned_steps=planned if isinstance(planned, int) else None,
        seen_at=view.step,
        tokens=run.end.tokens if run.end else sum(step.tokens for step in run.steps),
        seconds=run.end.seconds if run.end else math.fsum(s.seconds for s in run.steps if math.isfinite(s.seconds)),
        started=run.header.started,
        message=run.end.message if run.end else "",
        problems=run.problems,
    )


def _problems(runs: Sequence[Run]) -> list[str]:
    found = []
    for run in runs:
        sentences = usable(run)[2] + run.problems
        found += [f"{run.path.name}: {one}" for one in sentences[:10]]
        if len(sentences) > 10:
            found.append(f"{run.path.name}: and {len(sentences) - 10} more lines that cannot be read")
        if not run.steps:
            found.append(f"{run.path.name}: no step was recorded")
        if run.status == "failed":
            found.append(f"{run.path.name}: failed at step {_reached(run)}: {run.end.message if run.end else ''}")
    return found


def _noise_floor(view: RunView) -> dict[str, float]:
    """Column -> MaxVio that uniformly random routing of as many tokens would show on average."""
    tokens = {one.key: one.noise_tokens(view) for one in COMPARISON_COLUMNS if one.noise_tokens}
    known = {key: count for key, count in tokens.items() if math.isfinite(count) and count > 0}
    top_p, choices = view.config.get("model.top_p"), view.experts_per_token
    top_k = choices if top_p and choices > 0 else view.header.top_k
    return {key: random_maxvio(count, top_k, view.header.num_experts) for key, count in known.items()}


def _facts(view: RunView) -> dict[str, Any]:
    header = view.header
    return {
        "layers": header.num_layers,
        "experts": header.num_experts,
        "top_k": header.top_k,
        "expert_widths": header.expert_widths,
        "parameters": header.parameters,
        "active_parameters": header.active_parameters,
        "tokens_per_step": mean(step.tokens for step in view.window),
        "tokens": math.fsum(step.tokens for step in view.steps),
    }
