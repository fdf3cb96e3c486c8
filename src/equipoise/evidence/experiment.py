"""What a claim compares where it is no training of the lab: an experiment, a named function of (case, settings, seed).

Its cases are what strategies are to a run of the lab: the two sides of a contrast, paired by seed. A module of
`evidence.experiments`, or one of your own that Python can import, holds it as ``EXPERIMENT``.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, unknown_name
from ..lab.comparison.workers import Job, orphaned
from ..lab.config.loading import from_dict, merge
from ..storage.codec import FieldError, Rules, decode, encode, without_nan
from ..storage.files import atomic_write

__all__ = ["EXPERIMENTS", "LOSS", "Experiment", "Outcome", "Progress", "Trial", "TrialJob", "experiment_of",
           "read_outcome", "run_trial", "trial_of"]  # fmt: skip

EXPERIMENTS: tuple[str, ...] = ("adaptive_top_k", "diffusion", "fusion", "upcycle")  # modules of `evidence.experiments`
LOSS = "loss"  # the measure of every experiment that has held-out losses by domain: their mean
TRIAL, OUTCOME = "trial.json", "outcome.json"
RULES = Rules(null_is_nan=True)
WATCH_SECONDS = 1.0  # between two looks whether the parent is there
Progress = Callable[[str, float], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one run of an experiment found: a number for each of its measures, NaN where a case has none.

    ``loss`` is held-out loss in nats per token by domain, of an experiment that trains; ``tokens`` what it read.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    loss: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    corpus: str = ""  # this and the next are set by `run_trial`
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A named function (case, settings, seed) -> numbers.

    Args:
        settings: a frozen dataclass whose fields all have a default. The defaults are the instrument, as base.toml is
            for runs of the lab; a field named ``data`` is where text lies and is no part of what a run is.
        measures: name -> unit of what it finds. `LOSS` need not be named: it is the mean of ``Outcome.loss``.
        check: given (case, settings), raises ConfigError for what cannot run. It loads nothing.
        corpus: given (settings, progress), names the text or the images, by twelve digits of their digest; pairs are
            of one text.
        run: given (case, settings, seed, a folder of its own), does it. What it leaves in the folder is there again
            when it goes on after a stop; when it has ended the folder is removed.
        version: raised when the same settings give other numbers.
    """

    settings: type
    measures: Mapping[str, str]
    check: Callable[[str, Any], None]
    corpus: Callable[[Any, Progress], str]
    run: Callable[[str, Any, int, Path], Outcome]
    version: int = 1


@dataclass(frozen=True)
class Trial:
    """One run of an experiment, as `RunConfig` is one of the lab."""

    experiment: str
    case: str
    settings: Any
    seed: int


@dataclass
class TrialJob(Job):
    """A trial as a job for the lab's pool of workers."""

    config: Trial

    @property
    def steps(self) -> int:
        return 1

    @property
    def threads(self) -> int:
        return 1

    def arguments(self) -> list[str]:
        trial = {"experiment": self.config.experiment, "case": self.config.case, "seed": self.config.seed,
                 "settings": encode(self.config.settings)}  # fmt: skip
        (self.folder / TRIAL).write_text(json.dumps(trial), encoding="utf-8")
        return ["reproduce", "--trial", str(self.folder)]


def experiment_of(name: str) -> Experiment:
    """By its name here, or as a module of your own (``my_package.my_experiment``). Raises ConfigError.

    >>> experiment_of("upcycled")
    Traceback (most recent call last):
    equipoise.errors.ConfigError: expected an experiment: ...
    """
    if name not in EXPERIMENTS and "." not in name:
        raise unknown_name("experiment", name, EXPERIMENTS)
    module = f"{__package__}.experiments.{name}" if name in EXPERIMENTS else name
    try:
        found = importlib.import_module(module).EXPERIMENT
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            expected=f"an experiment in {module}",
            got=str(error),
            do="put EXPERIMENT = Experiment(...) there, on a path that Python imports from (PYTHONPATH)",
        ) from None
    return found


def trial_of(name: str, case: str, settings: Mapping[str, Any], seed: int) -> Trial:
    """A trial with these settings over the experiment's own. Raises ConfigError for what cannot run."""
    experiment = experiment_of(name)
    trial = Trial(name, case, from_dict(experiment.settings, merge({}, settings)), seed)
    experiment.check(case, trial.settings)
    return trial


def run_trial(folder: Path) -> None:
    """Runs the trial that a `TrialJob` wrote into ``folder`` and leaves its outcome there; ends with its parent.

    Raises DataError for a folder without one, and what the experiment raises.
    """
    trial = _read_trial(folder)
    experiment = experiment_of(trial.experiment)
    with _ends_with_its_parent():
        began = time.perf_counter()
        found = experiment.run(trial.case, trial.settings, trial.seed, folder)
        seconds = time.perf_counter() - began
        corpus = experiment.corpus(trial.settings, lambda text, share: None)  # noqa: ARG005
    plain = without_nan(encode(found)) | {"seconds": seconds, "corpus": corpus}
    atomic_write(folder / OUTCOME, json.dumps(plain, allow_nan=False).encode())


def read_outcome(folder: Path) -> Outcome:
    """What `run_trial` left. Raises DataError where it did not come to its end."""
    try:
        return decode(Outcome, json.loads((folder / OUTCOME).read_bytes()), RULES)
    except (OSError, ValueError, FieldError) as error:
        raise DataError(expected=f"the outcome of an experiment in {folder}", got=str(error)[:120],
                        do="see its worker.log, then run it again") from None  # fmt: skip


def _read_trial(folder: Path) -> Trial:
    try:
        plain = json.loads((folder / TRIAL).read_bytes())
        return trial_of(plain["experiment"], plain["case"], plain["settings"], plain["seed"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(expected=f"{TRIAL} in {folder}", got=f"{type(error).__name__}: {error}"[:120],
                        do="start it with `equipoise reproduce NAME`, which writes the file") from None  # fmt: skip


@contextmanager
def _ends_with_its_parent() -> Iterator[None]:
    """As if the parent had stopped this worker, when it is gone."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            if orphaned():
                os.kill(os.getpid(), signal.SIGTERM)
                return

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
