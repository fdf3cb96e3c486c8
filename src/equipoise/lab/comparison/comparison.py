"""A comparison: strategies × seeds as paired runs in one folder, trained by worker processes.

    runs/compare-20260131-120000/
      comparison.json         what is compared and how far it is (this file's manifest)
      micro-seed0/            one run: run.toml, record.jsonl, checkpoints, worker.log
      global-seed0/ ...
      report.html

Runs of one seed start from the same weights and see the same batches in the same order; only the strategy differs.
"""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...errors import ConfigError, OutputError
from ...storage.codec import encode
from ...storage.files import atomic_write
from ...storage.locks import LOCK_NAME, locked
from ...storage.run_record import RECORD_NAME, begun, read_run
from ..config.schema import CompareConfig, RunConfig, from_dict
from ..config.strategies import NAMES, slug, strategy_of
from .workers import CONFIG_NAME, Job, Pool, View, run_jobs, slots

__all__ = ["MANIFEST_NAME", "REPORT_NAME", "Comparison", "find_unfinished", "new_folder",
            "open_comparison", "plan", "prepare_all", "read_manifest", "run_all"]  # fmt: skip

MANIFEST_NAME = "comparison.json"
REPORT_NAME = "report.html"
SCHEMA = 1
MAY_DIFFER = ("strategies", "seeds", "strategy", "workers")  # between two commands for one folder


@dataclass
class Comparison:
    """An opened folder with its jobs; ``config`` is what all runs share."""

    folder: Path
    config: CompareConfig
    jobs: list[Job]
    started: str

    @property
    def exit_code(self) -> int:
        """0 when every run finished; the code of the failed ones when they agree, else 1."""
        codes = {job.exit_code for job in self.jobs if job.status == "failed"}
        if not codes:
            return 0
        return max(codes.pop(), 1) if len(codes) == 1 else 1

    @property
    def status(self) -> str:
        states = {job.status for job in self.jobs}
        for state in ("running", "interrupted", "waiting", "failed"):
            if state in states:
                return state
        return "finished"

    def save(self) -> None:
        """Writes the manifest; a kill leaves the old one or the new one."""
        manifest = {
            "schema": SCHEMA,
            "status": self.status,
            "started": self.started,
            "versions": versions(),
            "config": encode(self.config),
            "runs": [
                {"folder": job.folder.name, "strategy": job.config.strategy, "seed": job.config.train.seed,
                 "status": job.status, "error": job.error}
                for job in self.jobs
            ],
        }  # fmt: skip
        path = self.folder / MANIFEST_NAME
        try:
            atomic_write(path, (json.dumps(manifest, indent=1) + "\n").encode())
        except OutputError as error:
            raise _cannot_write(path, error.got) from None


def plan(config: CompareConfig, folder: Path) -> list[Job]:
    """One job per strategy and seed, all strategies of the first seed first. Raises ConfigError for a wrong name.

    >>> [job.name for job in plan(CompareConfig(strategies=("micro", "global"), seeds=2), Path("runs"))]
    ['micro-seed0', 'global-seed0', 'micro-seed1', 'global-seed1']
    """
    defined = {one.name: one for one in config.strategy}
    for name in defined:
        if name in NAMES:
            raise ConfigError(
                expected="a new name for a strategy of your own", got=repr(name), do="choose another name"
            )
    jobs = []
    for seed in range(config.train.seed, config.train.seed + config.seeds):
        for name in config.strategies:
            model, policies = config.model, ()
            if name in defined:
                policies = defined[name].policies
                model = replace(model, gate=defined[name].gate) if model.gate == "auto" else model
            train = replace(config.train, seed=seed)
            run = RunConfig(model=model, data=config.data, train=train, strategy=name, policies=policies)
            strategy_of(run)
            jobs.append(Job(f"{slug(name)}-seed{seed}", folder / f"{slug(name)}-seed{seed}", run))
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(expected="strategies with folder names of their own", got=", ".join(twice), do="rename one")
    return jobs


def new_folder(root: Path, now: datetime | None = None) -> Path:
    """``root/compare-YYYYmmdd-HHMMSS``, with a number behind it when two start in the same second."""
    stem = f"compare-{now or datetime.now():%Y%m%d-%H%M%S}"
    names = (stem if n == 1 else f"{stem}-{n}" for n in range(1, 1000))
    return next(root / name for name in names if not (root / name).exists())


def find_unfinished(root: Path, config: CompareConfig | None = None) -> Path | None:
    """The newest comparison under ``root``, if it is unfinished, free, and (where given) of this configuration."""
    found = sorted(root.glob(f"compare-*/{MANIFEST_NAME}"), key=lambda path: path.parent.name, reverse=True)
    if not found:
        return None
    folder = found[0].parent
    manifest = read_manifest(folder)
    if manifest is None or manifest["status"] == "finished" or _is_locked(folder):
        return None
    if config is not None:
        try:
            there = from_dict(CompareConfig, manifest["config"])
        except ConfigError:  # of another version, which had other settings
            return None
        same = replace(config, workers=there.workers) == there and manifest["versions"] == versions()
        return folder if same else None
    return folder


def open_comparison(folder: Path, config: CompareConfig, *, overwrite: bool = False) -> Comparison:
    """A new folder, or an existing one whose runs can be continued; finished runs count as done.

    More strategies and seeds may be added to a folder; everything else must be equal. Raises OutputError for a folder
    that holds something else, and ConfigError for a configuration that cannot work.
    """
    plan(config, folder)
    manifest = read_manifest(folder)
    try:
        if manifest is None and folder.exists() and {path.name for path in folder.iterdir()} - {LOCK_NAME}:
            raise OutputError(
                expected="a new folder, or one that `equipoise compare` wrote",
                got=f"{folder} holds something else",
                do="choose another --out",
            )
        if manifest is not None and overwrite:
            _remove(folder, manifest)
            manifest = None
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise error if isinstance(error, OutputError) else _cannot_write(folder, error.strerror) from None
    if manifest is not None:
        config = _merged(folder, manifest, config)
    started = manifest["started"] if manifest else datetime.now(UTC).isoformat(timespec="seconds")
    comparison = Comparison(folder, config, plan(config, folder), started)
    for job in comparison.jobs:
        job.tail.read()
        if _finished(job):
            job.status = "finished"
    return comparison


def prepare_all(comparison: Comparison, progress: Callable[[str, float], None]) -> None:
    """Prepares what all runs share: checks every strategy, and puts packed text and tokenizer into the cache."""
    from ..models.pretrained import prepare_text

    for job in comparison.jobs:
        strategy_of(job.config).check(job.config)
    prepare_text(comparison.config.model, comparison.config.data, progress)


def run_all(comparison: Comparison, view: View) -> None:
    """Trains what is not finished. A failed run does not stop the others; Ctrl-C stops all of them, saved.

    Raises OutputError when another process works in this folder, KeyboardInterrupt after everything has been saved.
    """
    with locked(comparison.folder):
        comparison.save()
        threads, workers = comparison.config.train.threads, comparison.config.workers
        run_jobs(Pool(comparison.jobs, slots(threads, workers)), view, lambda _: comparison.save())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a comparison's folder, None where there is none. Raises OutputError for a broken one."""
    path = folder / MANIFEST_NAME
    if not path.exists():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] == SCHEMA and {"status", "started", "versions", "config", "runs"} <= set(manifest):
            return manifest
        got = f"schema {manifest['schema']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {error}"
    raise OutputError(expected=f"a manifest of this version at {path}", got=got, do="choose another --out")


def versions() -> dict[str, str]:
    """Of everything that changes the numbers of a run."""
    return {name: importlib.metadata.version(name) for name in ("equipoise", "torch")}


def _merged(folder: Path, manifest: dict[str, Any], config: CompareConfig) -> CompareConfig:
    """The earlier configuration with the strategies and seeds of both; everything else has to be equal."""
    earlier = from_dict(CompareConfig, manifest["config"])  # settings that came later have their defaults
    there, here = _flat(encode(earlier)), _flat(encode(config))
    there |= {f"version of {name}": version for name, version in manifest["versions"].items()}
    here |= {f"version of {name}": version for name, version in versions().items()}
    for key in sorted(there.keys() | here.keys()):
        if key not in MAY_DIFFER and there.get(key) != here.get(key):
            raise OutputError(
                expected=f"the configuration of {folder}: {key} = {there.get(key)}",
                got=f"{key} = {here.get(key)}",
                do="choose another --out, or --overwrite to remove its runs",
            )
    own = {one.name: one for one in earlier.strategy}
    for one in config.strategy:
        if own.setdefault(one.name, one) != one:
            raise OutputError(
                expected=f"strategy {one.name!r} as {folder} has it", got="another list of policies", do="rename it"
            )
    return replace(
        config,
        strategies=tuple(dict.fromkeys(earlier.strategies + config.strategies)),
        seeds=max(earlier.seeds, config.seeds),
        strategy=tuple(own.values()),
    )


def _flat(data: dict[str, Any], table: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= _flat(value, f"{table}{key}.") if isinstance(value, dict) else {table + key: value}
    return flat


def _finished(job: Job) -> bool:
    if not begun(job.folder):
        return False
    run = read_run(job.folder)
    return run.status == "finished" and run.end is not None and run.end.step >= job.steps


def _is_locked(folder: Path) -> bool:
    try:
        with locked(folder):
            return False
    except OutputError:
        return True


def _remove(folder: Path, manifest: dict[str, Any]) -> None:
    """Removes what `compare` wrote and nothing else: names in a manifest are not trusted as paths."""
    with locked(folder):
        for run in manifest["runs"]:
            inside = folder / Path(run["folder"]).name
            if (inside / RECORD_NAME).exists() or (inside / CONFIG_NAME).exists():
                shutil.rmtree(inside)
        for name in (REPORT_NAME, MANIFEST_NAME):
            (folder / name).unlink(missing_ok=True)


def _cannot_write(path: Path, reason: str | None) -> OutputError:
    return OutputError(
        expected=f"to write {path}",
        got=reason or "an error of the file system",
        do="free disk space or choose another folder with --out; everything written before is kept",
    )
