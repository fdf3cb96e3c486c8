"""Small runs as they are compared: those of a folder, at the last step that any of them was evaluated at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import DataError, unknown_name
from ...report.data.comparability import differing
from ...report.data.run_view import view_run
from ...storage.run_record import RECORD_NAME, Evaluation, Run, read_run

__all__ = ["LastEvaluations", "last_evaluations", "read_small_runs"]


@dataclass(frozen=True)
class LastEvaluations:
    """By strategy each run with its last evaluation; what was left out is in ``problems``."""

    by_name: dict[str, list[tuple[Run, Evaluation]]]
    step: int
    problems: list[str]

    def baseline(self, asked: str | None, usual: str) -> str:
        """The strategy asked for; by default the usual one, where it is there, else the first.

        Raises ConfigError for one asked for that none of the compared runs is of.
        """
        if asked is not None and asked not in self.by_name:
            raise unknown_name("strategy of these runs", asked, self.by_name)
        return asked or (usual if usual in self.by_name else next(iter(self.by_name)))


def read_small_runs(folder: Path, first: Sequence[str], task: str, command: str) -> list[Run]:
    """The runs in the folders of ``folder``, those of the strategies in ``first`` before others.

    Raises DataError where there are none.
    """
    runs = [read_run(path.parent, task) for path in sorted(folder.glob(f"*/{RECORD_NAME}"))]
    if not runs:
        raise DataError(expected=f"runs of {task} in {folder}", got="none", do=f"train some with `equipoise {command}`")
    order = {name: at for at, name in enumerate(first)}
    return sorted(runs, key=lambda run: (order.get(run.header.strategy, len(order)), run.header.strategy,
                                         run.header.seed))  # fmt: skip


def last_evaluations(runs: Sequence[Run]) -> LastEvaluations:
    """Runs of fewer steps than the longest are named and left out. Raises DataError where no run was evaluated."""
    found = [(run, evaluation) for run in runs if (evaluation := view_run(run, None).evaluation)]
    last = max((evaluation.step for _, evaluation in found), default=0)
    evaluated = {run.path for run, _ in found}
    problems = [f"{run.path.name}: not evaluated" for run in runs if run.path not in evaluated]
    by_name: dict[str, list[tuple[Run, Evaluation]]] = {}
    for run, evaluation in found:
        if evaluation.step < last:
            problems.append(f"{run.path.name}: at step {evaluation.step}, not compared")
        else:
            by_name.setdefault(run.header.strategy, []).append((run, evaluation))
        problems += [f"{run.path.name}: {text}" for text in run.problems]
    unlike = differing(run for of_strategy in by_name.values() for run, _ in of_strategy)
    problems += [
        f"the runs differ in {name}, not in the strategy alone: {', '.join(values)}"
        for name, values in unlike.items()
        if name != "experts"
    ]  # of which a dense model has one
    if len(data := {run.header.corpus_sha256 for of_strategy in by_name.values() for run, _ in of_strategy}) > 1:
        problems.append(f"the runs read {len(data)} different data sets: their losses cannot be compared")
    problems += [f"{run.path.name}: failed, {run.end.message}" for run in runs if run.end and run.status == "failed"]
    if not by_name:
        raise DataError(expected="a run that was evaluated", got="; ".join(problems) or "no run", do="train further")
    return LastEvaluations(by_name, last, problems)
