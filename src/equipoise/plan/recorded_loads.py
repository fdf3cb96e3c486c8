"""Loads from files: runs and inspections give a fitted skew, files of counts are used unchanged."""

from __future__ import annotations

import csv
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..storage.inspection_record import is_inspection, read_inspection
from ..storage.run_record import RECORD_NAME, Run, read_run
from .loads import Array, Loads, RecordedCounts, fit
from .typical_skews import TYPICAL, Strategy, needs_counts

__all__ = ["RecordedLoads", "read_recorded_loads"]

TABLES = (".csv", ".npy", ".npz")
MOST_COUNTS = 5e7  # largest array that a .csv may describe


@dataclass(frozen=True)
class RecordedLoads:
    """Loads read from paths. Counts apply to their own number of layers and experts, a skew to any number."""

    strategies: list[Strategy]
    counted: dict[str, int]  # layers and experts of the files of counts; empty if there are none
    experts: list[int]  # numbers of experts of runs and inspections
    problems: list[str]
    most_top_k: int = 0  # that the counts allow: no token chooses an expert twice; 0 without counts


@dataclass(frozen=True)
class _Measured:
    """Mean MaxVio of a run, over its micro-batches and over more text."""

    name: str
    batch: float
    corpus: float
    scope: dict[str, int]  # arguments of `fit`


def read_recorded_loads(paths: Iterable[str | Path]) -> RecordedLoads:
    """Reads run folders, folders of runs, record files, inspections, and .npy, .npz or .csv files of counts.

    Seeds of one strategy are averaged. Raises DataError for a path that cannot be read and for a record without loads.
    """
    places = list(map(Path, paths))
    inspections = [place for place in places if is_inspection(place)]
    found = _read_runs_and_counts(place for place in places if place not in inspections)
    inspected = [_inspected(folder) for folder in inspections]
    return replace(
        found,
        strategies=[*found.strategies, *(strategy for strategy, _ in inspected)],
        experts=sorted({*found.experts, *(experts for _, experts in inspected)}),
    )


def _read_runs_and_counts(paths: Iterable[Path]) -> RecordedLoads:
    found: list[Strategy] = []
    measured: dict[str, list[_Measured]] = {}
    scopes: dict[str, dict[str, int]] = {}
    counted: dict[str, int] = {}
    problems: list[str] = []
    most: list[int] = []
    for path in _expand(paths):
        if path.suffix in TABLES:
            counts = RecordedCounts(_read_table(path))
            most.append(_most_top_k(counts.counts_MLE))
            if (counts.counts_MLE % 1).any():
                problems.append(f"{path.name}: fractions, which are taken for shares: only whole numbers are counts")
            origin = f"{path.name}: {counts.counts_MLE.shape[0]} micro-batches"
            found.append(Strategy(path.stem, counts, origin, counts=needs_counts(path.stem)))
            _agree(counted, {"layers": counts.counts_MLE.shape[1], "experts": counts.counts_MLE.shape[2]}, path)
        else:
            run = read_run(path)
            problems += [f"{path.name}: {text}" for text in run.problems]
            one = _measure(run)
            measured.setdefault(one.name, []).append(one)
            _agree(scopes.setdefault(one.name, {}), one.scope, path)
    order = sorted(measured, key=lambda name: list(TYPICAL).index(name) if name in TYPICAL else len(TYPICAL))
    experts = sorted({one.scope["experts"] for runs in measured.values() for one in runs})
    return RecordedLoads(
        [*found, *(_strategy(measured[name]) for name in order)], counted, experts, problems, min(most, default=0)
    )


def _most_top_k(counts_MLE: Array) -> int:
    """K at most: the fullest expert has a choice of each token, and these are 1 / K of all."""
    fullest_ML = counts_MLE.max(axis=-1)
    ran_ML = fullest_ML > 0
    share_R = counts_MLE.sum(axis=-1)[ran_ML] / fullest_ML[ran_ML]
    return max(int(share_R.min(initial=counts_MLE.shape[-1]) + 1e-9), 1)


def _expand(paths: Iterable[Path]) -> Iterable[Path]:
    for path in paths:
        runs = sorted(one.parent for one in path.glob(f"*/{RECORD_NAME}")) if path.is_dir() else []
        yield from runs if runs and not (path / RECORD_NAME).exists() else [path]


def _agree(known: dict[str, int], found: dict[str, int], path: Path) -> None:
    """Checks that files of counts, and seeds of a strategy, have one model and one batch layout."""
    for name, value in found.items():
        if known.setdefault(name, value) != value:
            raise DataError(expected=f"loads of one model, cut alike: {name} = {known[name]}", got=f"{value} in {path}",
                            do="plan for one of them at a time")  # fmt: skip


def _read_table(path: Path) -> Array:
    """Counts [micro-batches, layers, experts]: an array, or lines `micro_batch,layer,expert,count` with a heading."""
    try:
        if path.suffix == ".csv":
            return _read_csv(path)
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded.astype(float)
        if len(loaded.files) != 1:
            raise ValueError(f"{len(loaded.files)} arrays: {', '.join(loaded.files)}")
        return loaded[loaded.files[0]].astype(float)
    except OSError as error:
        got = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, EOFError) as error:
        got = str(error)
    raise DataError(expected=f"counts in {path}", got=got,
                    do="save numpy.save(file, counts) of shape [micro-batches, layers, experts], or a CSV with the "
                    "columns micro_batch, layer, expert, count") from None  # fmt: skip


def _read_csv(path: Path) -> Array:
    columns = ("micro_batch", "layer", "expert", "count")
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        missing = [name for name in columns if name not in (reader.fieldnames or ())]
        if missing:
            raise ValueError(f"no column {', '.join(missing)}")
        rows = []
        for number, row in enumerate(reader, start=2):
            try:
                rows.append((*(int(row[name]) for name in columns[:3]), float(row["count"])))
            except (ValueError, TypeError):
                raise ValueError(f"line {number}: {','.join(map(str, row.values()))}") from None
    if not rows:
        raise ValueError("no line below the heading")
    where = np.array([row[:3] for row in rows])
    if (where < 0).any():
        raise ValueError("a negative number of a micro-batch, layer or expert")
    if np.prod(where.max(axis=0) + 1.0) > MOST_COUNTS:
        raise ValueError(f"numbers of micro-batches, layers, experts up to {where.max(axis=0)}")
    counts = np.zeros(where.max(axis=0) + 1)
    np.add.at(counts, tuple(where.T), [row[3] for row in rows])
    return counts


def _measure(run: Run) -> _Measured:
    """MaxVio over the last quarter of the steps, or of the last evaluation if steps have none."""
    header, end = run.header, run.steps[-max(1, len(run.steps) // 4) :]
    train, data = _part(header.config, "train"), _part(header.config, "data")
    length, sequences = _whole(data, "sequence_length"), _whole(train, "sequences_per_micro_batch")
    micro_batches, mixed = _whole(train, "micro_batches"), data.get("mix") == "sequence"
    if not (length and sequences and micro_batches):
        raise DataError(expected=f"a record in {run.path} that says how its micro-batches were cut",
                        got="a header without sequence_length, sequences_per_micro_batch or micro_batches",
                        do="give the MaxVio instead: --maxvio NAME=0.8")  # fmt: skip
    if not 1 <= header.top_k <= header.num_experts:
        raise DataError(expected=f"1 <= top_k <= experts in {run.path}",
                        got=f"top_k={header.top_k}, experts={header.num_experts}", do="pass another run")  # fmt: skip
    if header.expert_widths or _part(header.config, "model").get("top_p"):
        raise DataError(expected=f"tokens that all cost as much, in {run.path}: experts of one width, K for each token",
                        got=f"widths {header.expert_widths}" if header.expert_widths else "a run with model.top_p",
                        do="give the MaxVio of the work instead: --maxvio NAME=0.8")  # fmt: skip
    batch = _mean(step.balance.get("balance/maxvio_micro_batch", math.nan) for step in end)
    corpus = _mean(step.balance.get("balance/maxvio_global", math.nan) for step in end)
    pairs = length * sequences * header.top_k
    sources = sequences if mixed else 1
    over = micro_batches
    if math.isnan(batch) or math.isnan(corpus):
        if not run.evaluations:
            raise DataError(expected=f"loads in {run.path}: MaxVio of steps, or an evaluation",
                            got=f"{len(run.steps)} steps without, no evaluation",
                            do="pass a run that was trained further, or give --maxvio NAME=0.8")  # fmt: skip
        last = run.evaluations[-1]
        batch, corpus = _mean(last.maxvio_micro_batch), _mean(last.maxvio_global)
        held_out = sum(n for n in last.tokens.values() if isinstance(n, int))
        over = max(1, held_out // (length * sequences))
    scope = {"experts": header.num_experts, "sources": sources, "pairs": pairs, "all_sources": sources * over,
             "all_pairs": pairs * over, "top_k": header.top_k}  # fmt: skip
    return _Measured(header.strategy, batch, corpus, scope)


def _strategy(runs: list[_Measured]) -> Strategy:
    batch, corpus = _mean(run.batch for run in runs), _mean(run.corpus for run in runs)
    loads: Loads = fit(batch, corpus, **runs[0].scope)
    seeds = f" of {len(runs)} runs" if len(runs) > 1 else ""
    origin = f"recorded MaxVio{seeds}: {batch:.2f} per micro-batch, {corpus:.2f} per step"
    return Strategy(runs[0].name, loads, origin, counts=needs_counts(runs[0].name))


def _inspected(folder: Path) -> tuple[Strategy, int]:
    """The skew with the mean MaxVio of the layers of the most common shape, and the number of experts of these."""
    inspection = read_inspection(folder)
    if not inspection.layers:
        raise DataError(expected=f"an inspection of MoE layers in {folder}", got="none", do="inspect another model")
    shapes = Counter((one.num_experts, one.top_k) for one in inspection.layers)
    (experts, top_k), number = shapes.most_common(1)[0]
    layers = [one for one in inspection.layers if (one.num_experts, one.top_k) == (experts, top_k)]
    batch = sum(one.maxvio_micro_batch for one in layers) / number
    corpus = sum(one.maxvio_global for one in layers) / number
    pairs = inspection.facts.sequence_length * top_k
    windows = max(1, inspection.facts.equal_windows) * max(1, len(inspection.domains))
    skew = fit(batch, corpus, experts=experts, sources=1, pairs=pairs * inspection.facts.micro_batch,
               all_sources=windows, all_pairs=windows * pairs, top_k=top_k)  # fmt: skip
    origin = f"inspected {inspection.facts.model}: MaxVio {batch:.2f} per micro-batch, {corpus:.2f} over all"
    return Strategy(folder.resolve().name, skew, origin), experts


def _mean(values: Iterable[Any]) -> float:
    """Mean of the numbers among ``values``, since a record may contain anything."""
    known = [value for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return sum(known) / len(known) if known else math.nan


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _whole(part: dict[str, Any], name: str) -> int:
    value = part.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0
