"""Checks whether runs can be compared: same text, same settings, same length. Every difference becomes a warning."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ...storage.run_record import Run
from .formatting import clean
from .run_view import flatten

__all__ = ["Settings", "common_step", "compare_settings", "settings_key"]

# Settings that affect neither training nor evaluation, or that identify the strategy and the seed
FREE = {"strategy", "policies", "train.seed", "train.eval_every", "train.checkpoint_every", "train.keep_checkpoints",
        "train.load_every", "train.fidelity_every", "train.log", "train.tensorboard", "train.threads"}  # fmt: skip
BY_STRATEGY = {"model.gate", "model.selection_bias"}  # a strategy may set its own gate
SAME_TEXT = {"corpus", "domains", "data.domains", "data.sequence_length", "model.vocab_size", "train.eval_sequences"}
OFF = ("", "0", "0.0", "False", "None")
MOST_SHOWN = 6

Settings = dict[str, str]  # name -> value, as shown


def settings(run: Run) -> Settings:
    """Everything that two comparable runs must agree on: dotted name -> value as text."""
    header = run.header
    flat = {key: _text(value) for key, value in flatten(header.config).items() if key not in FREE}
    return flat | {
        "corpus": header.corpus_sha256[:12],
        "domains": ", ".join(header.domains),
        "MoE layers": str(header.num_layers),
        "experts": str(header.num_experts),
        "top-k": str(header.top_k),
    }


def settings_key(run: Run) -> tuple[tuple[str, str], ...]:
    """Runs of one strategy with equal keys differ only in the seed."""
    return tuple(sorted(settings(run).items()))


def differing(runs: Iterable[Run]) -> dict[str, list[str]]:
    """Settings that are not equal in all runs, with their values."""
    each = [settings(run) for run in runs]
    keys = sorted({key for one in each for key in one})
    values = {key: list(dict.fromkeys(one.get(key, "not set") for one in each)) for key in keys}
    for found in values.values():  # a setting that came after a run was recorded was off in it
        if "not set" in found and any(other in OFF for other in found):
            found.remove("not set")
    return {key: found for key, found in values.items() if len(found) > 1}


def compare_settings(runs: Mapping[str, Sequence[Run]]) -> tuple[list[str], bool, list[str]]:
    """Compares the settings of all runs.

    Args:
        runs: label of a strategy -> its runs.

    Returns warnings, whether all runs were evaluated on the same text, and the settings that differ besides the
    strategy.
    """
    warnings = []
    unlike = differing(run for group in runs.values() for run in group)
    other_text = [key for key in unlike if key in SAME_TEXT]
    others = [key for key in unlike if key not in SAME_TEXT | BY_STRATEGY]
    if other_text:
        warnings.append(
            f"The runs were not evaluated on the same text: {_listed(unlike, other_text)}. "
            "Their numbers stand side by side, but no difference is taken."
        )
    if others:
        warnings.append(
            f"The runs differ in more than the strategy: {_listed(unlike, others)}. "
            "A difference between them may come from that."
        )
    if gates := [key for key in unlike if key in BY_STRATEGY]:
        warnings.append(f"Some strategies bring their own router: {_listed(unlike, gates)}.")
    seeds = {label: sorted({run.header.seed for run in group}) for label, group in runs.items()}
    if len({tuple(one) for one in seeds.values()}) > 1:
        text = "; ".join(f"{clean(label)} {', '.join(map(str, one))}" for label, one in seeds.items())
        warnings.append(f"Not every strategy ran the same seeds ({text}): differences use the shared ones only.")
    made = sorted({run.header.versions.get("equipoise", "an unknown one") for group in runs.values() for run in group})
    if len(made) > 1:
        warnings.append(f"The records were written by different versions of equipoise: {clean(', '.join(made))}.")
    return warnings, not other_text, others


def common_step(runs: Sequence[Run], evaluated: Sequence[Sequence[int]]) -> tuple[int | None, list[str]]:
    """Finds the last step at which all finished runs (all runs, if none has finished) were evaluated.

    Args:
        evaluated: for each run the steps of its usable evaluations.

    Returns the step, None if the runs share none, and warnings.
    """
    warnings = []
    finished = [set(steps) for run, steps in zip(runs, evaluated, strict=True) if run.status == "finished" and steps]
    sets = finished or [set(steps) for steps in evaluated if steps]
    if not sets:
        return None, ["No run has been evaluated on held-out text yet."] if runs else []
    common = set.intersection(*sets)
    if not common:
        return None, ["The runs share no step at which they were evaluated: each is shown at its own last one."]
    step = max(common)
    if any(max(steps) > step for steps in evaluated if steps):
        warnings.append(f"The runs have different lengths: numbers are taken at step {step}, the last that they share.")
    return step, warnings


def _listed(values: Mapping[str, Sequence[str]], keys: Sequence[str]) -> str:
    parts = [f"{clean(key)} ({' | '.join(clean(v)[:60] for v in values[key][:4])})" for key in keys[:MOST_SHOWN]]
    more = len(keys) - MOST_SHOWN
    return ", ".join(parts) + (f" and {more} more" if more > 0 else "")


def _text(value: object) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
