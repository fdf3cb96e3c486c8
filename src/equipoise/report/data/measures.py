"""The numbers of the report: how each is read from a run, which way is better, and what it means in one sentence."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .run_view import Observation, is_number, mean

__all__ = ["GROUPS", "MEASURES", "SCOPES", "Measure"]

GROUPS = ("Quality", "Specialization", "Balance in training", "Balance on held-out text", "Cost")
SCOPES = {"sequence": "one sequence", "micro_batch": "one micro-batch", "global": "all of it"}


@dataclass(frozen=True)
class Measure:
    """``ratio``: differences are relative, means geometric. ``better`` is "lower", "higher" or "" (it depends)."""

    key: str
    label: str
    group: str
    explain: str
    read: Callable[[Observation], float]
    better: str = ""
    unit: str = ""
    ratio: bool = False
    places: int | None = None
    compared: bool = True  # a control has no difference worth showing


def _perplexity(seen: Observation) -> float:
    return seen.evaluation.perplexity if seen.evaluation else math.nan


def _held_out(name: str) -> Callable[[Observation], float]:
    """Mean over layers (or domains) of a field of the evaluation."""

    def read(seen: Observation) -> float:
        value = getattr(seen.evaluation, name, None)
        return mean(_numbers(value)) if value is not None else math.nan

    return read


def _dead(seen: Observation) -> float:
    known = _numbers(seen.evaluation.dead_experts) if seen.evaluation else []
    return math.fsum(known) if known else math.nan


def _numbers(value: object) -> list[float]:
    """All finite numbers in nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [one for part in value for one in _numbers(part)]
    return [value] if is_number(value) else []  # type: ignore[list-item]


def _trained(name: str) -> Callable[[Observation], float]:
    return lambda seen: seen.trained(name)


def _speed(seen: Observation) -> float:
    return seen.over_steps(lambda step: step.tokens / step.seconds if step.seconds > 0 else math.nan)


def _seconds(seen: Observation) -> float:
    return seen.over_steps(lambda step: step.seconds if step.seconds > 0 else math.nan)


def _memory(seen: Observation) -> float:
    return float(seen.run.end.peak_memory_bytes) if seen.run.end else math.nan


MAXVIO = "MaxVio = largest load of an expert / mean load − 1: 0 is even, 1 means that one expert works twice its share"

MEASURES = (
    Measure("perplexity", "Perplexity", "Quality",
            "How many tokens the model still hesitates between on text it has not seen; domains count alike.",
            _perplexity, "lower", ratio=True),
    Measure("bits_per_byte", "Bits per byte", "Quality",
            "The same loss, free of the tokenizer: bits needed for one byte of held-out text.",
            _held_out("bits_per_byte"), "lower", places=3),
    Measure("train_loss", "Training loss", "Quality",
            "Mean cross-entropy over the last quarter of the steps, without the balance loss.",
            lambda seen: mean(step.loss for step in seen.window), "lower", "nats", places=3),
    Measure("mutual_information", "Domain information", "Specialization",
            "Mutual information of expert and domain: what the choice of an expert tells about the domain of the text.",
            _held_out("mutual_information"), "higher", "nats"),
    Measure("mutual_information_shuffled", "… labels shuffled", "Specialization",
            "The same with the domain labels shuffled: what chance alone gives, so only the excess over it counts.",
            _held_out("mutual_information_shuffled"), "", "nats", compared=False),
    Measure("topk_score", "Top-K score", "Specialization",
            "Probability that the gate puts on the experts it chose: above K/E the router has an opinion.",
            _held_out("topk_score")),
    Measure("train_maxvio_global", "MaxVio, global batch", "Balance in training",
            f"{MAXVIO}; here per optimizer step, mean over the last quarter.",
            _trained("balance/maxvio_global"), "lower"),
    Measure("train_maxvio_micro_batch", "MaxVio, micro-batch", "Balance in training",
            "The same inside one micro-batch. One domain may well prefer some experts, so lower is not better here.",
            _trained("balance/maxvio_micro_batch")),
    Measure("train_maxvio_sequence", "MaxVio, sequence", "Balance in training",
            "The same inside one sequence, where specialists must show as imbalance.",
            _trained("balance/maxvio_sequence")),
    Measure("heldout_maxvio_global", "MaxVio, all text", "Balance on held-out text",
            "Load over all held-out text, every domain included: the straggler factor minus 1.",
            _held_out("maxvio_global"), "lower"),
    Measure("heldout_maxvio_micro_batch", "MaxVio, micro-batch", "Balance on held-out text",
            "The same inside micro-batches of the training size.",
            _held_out("maxvio_micro_batch")),
    Measure("heldout_maxvio_sequence", "MaxVio, sequence", "Balance on held-out text",
            "The same inside single sequences.",
            _held_out("maxvio_sequence")),
    Measure("dead_experts", "Dead experts", "Balance on held-out text",
            "Experts, over all layers, that no held-out token chose: weights that do nothing.",
            _dead, "lower"),
    Measure("tokens_per_second", "Tokens per second", "Cost",
            "Training speed, median over the steps; evaluation and checkpoints left out.",
            _speed, "higher", ratio=True, places=0),
    Measure("seconds_per_step", "Seconds per step", "Cost",
            "Wall time of one optimizer step, median.",
            _seconds, "lower", "s", ratio=True),
    Measure("peak_memory", "Peak memory", "Cost",
            "Most memory that the training process held.",
            _memory, "lower", "bytes", ratio=True),
)  # fmt: skip
