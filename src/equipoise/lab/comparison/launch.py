"""A comparison as the command line starts it: the folder is chosen, runs are trained with progress on the console."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import DataError
from ...report.data.formatting import plural
from ..config.schema import CompareConfig, from_dict
from .comparison import (
    MANIFEST_NAME,
    Comparison,
    find_unfinished,
    new_folder,
    open_comparison,
    plan,
    prepare_all,
    read_manifest,
    run_all,
)
from .progress import Preparation, RunTable, open_console

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["launch_comparison"]

ROOT = Path("runs")


def launch_comparison(
    config: CompareConfig, *, out: Path | None, resume: Path | None, new: bool, overwrite: bool
) -> Comparison:
    """Trains what is not finished of a comparison, and returns it.

    Args:
        config: what is compared; with ``resume``, the configuration in the folder takes its place.
        out: the folder; by default that of a stopped comparison of the same configuration, else a new one.
        resume: the folder of a comparison to continue, or one whose newest unfinished comparison is continued.
        new: do not look for a stopped comparison.
        overwrite: remove the runs in ``out`` first.

    Raises DataError where there is nothing to resume, KeyboardInterrupt after everything was saved, and what
    `open_comparison`, `prepare_all` and `run_all` raise.
    """
    console = open_console()
    folder = _folder(config, out, resume, new, console)
    if resume:
        config = from_dict(CompareConfig, (read_manifest(folder) or {})["config"])
    new_one = Comparison(folder, config, plan(config, folder), "")  # what is there goes once this one is prepared
    comparison = new_one if overwrite else open_comparison(folder, config)
    console.print(f"{plural(len(comparison.jobs), 'run')} in {folder}", markup=False, soft_wrap=True)
    if config.model.biases:
        console.print(f"all begin with the expert biases of {config.model.biases}", markup=False, soft_wrap=True)
    with Preparation(console) as shown:
        prepare_all(comparison, shown)
    if overwrite:
        comparison = open_comparison(folder, config, overwrite=True)
    try:
        with RunTable(comparison.jobs, console) as table:
            run_all(comparison, table)
    except KeyboardInterrupt:
        console.print(
            f"every run is saved; to go on: equipoise compare --resume {folder}\n"
            f"what there is so far: equipoise report {folder}",
            markup=False,
            soft_wrap=True,
        )
        raise
    return comparison


def _folder(config: CompareConfig, out: Path | None, resume: Path | None, new: bool, console: Console) -> Path:
    if out:
        return out
    if resume:
        found = resume if (resume / MANIFEST_NAME).exists() else find_unfinished(resume)
        if found is None:
            raise DataError(
                expected=f"an unfinished comparison in {resume}",
                got="none",
                do="name its folder, or start a new one",
            )
        return found
    found = None if new else find_unfinished(ROOT, config)
    if found is None:
        return new_folder(ROOT)
    console.print(
        f"going on with {found}, stopped with the same settings (--new begins again)", markup=False, soft_wrap=True
    )
    return found
