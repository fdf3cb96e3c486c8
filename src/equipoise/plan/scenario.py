"""What a plan is made for: the cluster and the strategies that follow from what a user names."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, unknown_name
from .cluster import Cluster, describe, read_toml
from .loads import fit
from .recorded_loads import RecordedLoads, read_recorded_loads
from .typical_skews import Strategy, needs_counts, typical

__all__ = ["Scenario", "make_scenario"]


@dataclass(frozen=True)
class Scenario:
    """The cluster, the strategies to compare on it, and sentences about what was assumed or could not be read."""

    cluster: Cluster
    strategies: list[Strategy]
    notes: list[str]


def make_scenario(
    loads: Sequence[str | Path] = (),
    settings: Mapping[str, Any] | None = None,
    *,
    file: str | Path | None = None,
    preset: str | None = None,
    gpu: str | None = None,
    maxvio: Sequence[str] = (),
    maxvio_over: int = 1,
    only: str | None = None,
) -> Scenario:
    """Reads loads, describes the cluster, and gives every strategy its loads.

    Args:
        loads: see `read_recorded_loads`.
        settings: of ``Cluster``, by name.
        file: a TOML file with settings, and with ``preset`` and ``gpu`` where those arguments are None. Defaults come
            first, then presets, the file, and ``settings``.
        preset, gpu: a model and a GPU by name.
        maxvio: more strategies as "NAME=X" or "NAME=X,Y", MaxVio X over the micro-batches of ``maxvio_over`` GPUs and
            Y over all text (default 0.1).
        only: names of the strategies to keep, separated by commas. Without loads or maxvio the typical five are there.

    Raises DataError for what cannot be read, ConfigError for what does not fit together.

    >>> one = make_scenario(maxvio=["ours=0.8"], only="ours")
    >>> one.cluster.experts, [strategy.origin for strategy in one.strategies]
    (128, ["MaxVio 0.8 over one GPU's micro-batch, 0.1 over all text"])
    """
    recorded = read_recorded_loads(loads)
    described = read_toml(file) if file else {}
    preset, gpu = preset or described.get("preset"), gpu or described.get("gpu")
    own = {name: value for name, value in described.items() if name not in ("preset", "gpu")}
    cluster, notes = _cluster(own | dict(settings or {}), preset, gpu, recorded)
    strategies = [*recorded.strategies, *(_by_maxvio(text, cluster, maxvio_over) for text in maxvio)]
    return Scenario(cluster, _chosen(strategies or typical(), only), [*recorded.problems, *notes])


def _cluster(
    settings: dict[str, Any], preset: str | None, gpu: str | None, recorded: RecordedLoads
) -> tuple[Cluster, list[str]]:
    """The cluster and notes about it. Where no model is named, it has the layers and experts that were counted."""
    notes: list[str] = []
    counted: dict[str, Any] = dict(recorded.counted)
    if counted and preset is None and "experts" not in settings:
        of_model = ("top_k", "width", "expert_hidden", "dense_parameters")
        if missing := [name for name in of_model if name not in settings]:
            notes.append(f"counts do not say {', '.join(missing)}: taken from qwen3-30b-a3b; use --preset or --set")
        fitting = {"top_k": min(Cluster.top_k, recorded.most_top_k), "ep": math.gcd(Cluster.ep, counted["experts"])}
        settings = fitting | counted | settings
    cluster = describe(preset, gpu, settings)
    if counted and cluster.experts != counted["experts"]:
        raise ConfigError(expected=f"a model of {counted['experts']} experts, as counted", got=f"{cluster.experts}",
                          do="leave the preset out, or give the counts' MaxVio: --maxvio NAME=X")  # fmt: skip
    if counted and cluster.top_k > recorded.most_top_k:
        most = f"{recorded.most_top_k} at most: with more an expert would have more choices than there are tokens"
        raise ConfigError(expected=f"a top_k of {most}", got=f"top_k={cluster.top_k}",
                          do="--set top_k=K of the model that was counted")  # fmt: skip
    notes += [
        f"recorded with {experts} experts: their skew is carried over to {cluster.experts}"
        for experts in recorded.experts
        if experts != cluster.experts
    ]
    return cluster, notes


def _by_maxvio(text: str, cluster: Cluster, over: int) -> Strategy:
    """The strategy of one ``--maxvio NAME=X,Y``."""
    name, sign, numbers = text.rpartition("=")
    try:
        batch, *rest = (float(number) for number in numbers.split(","))
        if len(rest) > 1:
            raise ValueError
    except ValueError:
        raise ConfigError(expected="--maxvio NAME=X or NAME=X,Y", got=repr(text),
                          do="e.g. --maxvio global=0.8,0.1") from None  # fmt: skip
    name = name if sign else f"maxvio {numbers}"
    corpus = rest[0] if rest else min(0.1, batch)
    sources = over * max(1, round(cluster.tokens / cluster.sequence))
    skew = fit(batch, corpus, experts=cluster.experts, sources=sources,
               pairs=over * cluster.tokens * cluster.top_k, top_k=cluster.top_k)  # fmt: skip
    where = "one GPU's micro-batch" if over == 1 else f"the micro-batches of {over} GPUs"
    origin = f"MaxVio {batch:g} over {where}, {corpus:g} over all text"
    return Strategy(name, skew, origin, counts=needs_counts(name))


def _chosen(strategies: list[Strategy], names: str | None) -> list[Strategy]:
    if names is None:
        return strategies
    by_name = {one.name: one for one in strategies}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in by_name:
            raise unknown_name("strategy", name, by_name)
    return [by_name[name] for name in dict.fromkeys(wanted)]
