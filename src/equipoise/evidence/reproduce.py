"""Runs what claims need and is not on record, and writes each run down the moment it has ended."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ConfigError, DataError
from ..lab.comparison.workers import Job, Runner, View, run_jobs
from ..lab.config.schema import RunConfig
from ..lab.config.strategies import slug, strategy_of
from ..lab.models.pretrained import prepare_text
from ..storage.locks import locked
from ..storage.run_record import read_run
from .claim import Claim
from .experiment import Trial, TrialJob, experiment_of, read_outcome
from .run_summary import lacks, read_summaries, run_key, seed_of, summarize_outcome, summarize_run, write_summaries

__all__ = ["RECORDS", "check_for_ray", "jobs_for", "missing_runs", "train_runs"]

RECORDS = "records"  # beside the claims


def missing_runs(
    claims: Sequence[Claim], records: Path, progress: Callable[[str, float], None]
) -> list[RunConfig | Trial]:
    """The runs of these claims that are not on record for the text of this machine, each once, seed by seed.

    One that was recorded before a measure was known which a contrast asks for is trained again. Prepares the text: only
    then it is known which text that is. Raises ConfigError for a strategy that its router refuses.
    """
    known = {(run.key, run.seed, run.corpus): run for run in (read_summaries(records) if records.is_dir() else [])}
    asked = _measures(claims)
    corpora: dict[str, str] = {}
    found: dict[tuple[str, int], RunConfig | Trial] = {}
    wanted = [config for claim in claims for config in claim.runs()]
    for config in sorted(wanted, key=seed_of):
        text = _text_of(config)
        if text not in corpora:
            corpora[text] = _corpus(config, progress)
        at = run_key(config), seed_of(config)
        run = known.get((*at, corpora[text]))
        if run is None or any(lacks(run, measure) for measure in asked[at]):
            found.setdefault(at, config)
    return list(found.values())


def _measures(claims: Sequence[Claim]) -> dict[tuple[str, int], set[str]]:
    """What the contrasts ask for of each run, by its key and seed."""
    asked: dict[tuple[str, int], set[str]] = {}
    for claim in claims:
        for contrast in claim.contrast:
            for side in ("baseline", "treated"):
                key = run_key(claim.run(contrast, side, contrast.first_seed))  # the seed is no part of it
                for seed in contrast.which:
                    asked.setdefault((key, seed), set()).add(contrast.measure)
    return asked


def jobs_for(missing: Sequence[RunConfig | Trial], folder: Path) -> list[Job]:
    """A job for each run, in a folder of its own."""
    jobs: list[Job] = []
    for config in missing:
        tried = isinstance(config, Trial)
        name = slug(f"{config.experiment}-{config.case}" if tried else config.strategy)
        name += f"-{run_key(config)}-seed{seed_of(config)}"
        jobs.append(TrialJob(name, folder / name, config) if tried else Job(name, folder / name, config))
    return jobs


def check_for_ray(missing: Sequence[RunConfig | Trial]) -> None:
    """Raises ConfigError for runs of experiments: a Ray cluster is sent trainings of the lab alone."""
    names = sorted({config.experiment for config in missing if isinstance(config, Trial)})
    if names:
        raise ConfigError(
            expected="claims about trainings of the lab, which go to a Ray cluster",
            got=f"claims about experiments: {', '.join(names)}",
            do="leave --on ray out for these claims: they run on this machine",
        )


def _text_of(config: RunConfig | Trial) -> str:
    if isinstance(config, Trial):
        return repr((config.experiment, config.settings))
    return repr((config.data, config.model.vocab_size, config.model.folder))


def _corpus(config: RunConfig | Trial, progress: Callable[[str, float], None]) -> str:
    if isinstance(config, Trial):
        return experiment_of(config.experiment).corpus(config.settings, progress)
    strategy_of(config).check(config)
    return prepare_text(config.model, config.data, progress).corpus_sha256[:12]


def train_runs(pool: Runner, records: Path, folder: Path, view: View) -> None:
    """Trains the runs of ``pool``.

    A run that ended is one line in ``records``, and its own folder is removed; a stopped one of this machine goes on
    from there with the next call. Raises OutputError when another process works in ``folder``, KeyboardInterrupt after
    everything has been saved.
    """

    def keep(changed: list[Job]) -> None:
        for job in changed:
            if job.status in ("finished", "failed"):
                _keep(job, records)

    with locked(folder):
        run_jobs(pool, view, keep)


def _keep(job: Job, records: Path) -> None:
    try:
        if isinstance(job.config, Trial):
            summary = summarize_outcome(read_outcome(job.folder), job.config)
        else:
            summary = summarize_run(read_run(job.folder), job.config)
    except DataError as error:  # it did not train: the job failed and its folder stays, for a look
        job.status, job.error = "failed", job.error or str(error)
        return
    write_summaries(records, [summary])
    job.status = "finished"  # a run that diverged is a result
    shutil.rmtree(job.folder, ignore_errors=True)
