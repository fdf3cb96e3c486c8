"""The numbers of a comparison, each in one place: how it is read from a run, explained, and shown.

The terminal, the page, the CSV and the JSON take their columns from here: to add one, add a ``Column``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .formatting import bytes_text, count, fine_perplexity, number
from .run_view import RunView, is_number, mean

__all__ = ["COMPARISON_COLUMNS", "GROUPS", "Column", "TerminalColumn"]

GROUPS = ("Quality", "Specialization", "Balance in training", "Balance on held-out text", "Cost")


@dataclass(frozen=True)
class TerminalColumn:
    """How a column is shown in the terminal, which has less room than the page.

    Args:
        heading: unique within its table; its width counts, a trailing space included.
        places: decimals, None for about three significant digits.
        over: heading over several neighbouring columns.
        difference: heading of a second column with the difference from the baseline; ``{baseline}`` is its name.
    """

    heading: str
    places: int | None = None
    over: str = ""
    difference: str = ""


@dataclass(frozen=True)
class Column:
    """One number of a run, and of a strategy as the mean over its runs.

    Args:
        key: its name in JSON, CSV and ``StrategySummary.values``.
        label, group, explain: what the page calls it, where it lists it, and what it means in one sentence.
        read: reads it from a run; NaN where it was not recorded.
        better: "lower", "higher", or "" where neither is better in general.
        ratio: differences are relative and means geometric.
        places: decimals on the page, None for about three significant digits.
        show: formats (value, places).
        compared: False for a control, whose differences mean nothing.
        noise_tokens: of a MaxVio, the number of tokens it is taken over, from which the noise floor follows.
        terminal: None for a number that only the page and the files have.
    """

    key: str
    label: str
    group: str
    explain: str
    read: Callable[[RunView], float]
    better: str = ""
    unit: str = ""
    ratio: bool = False
    places: int | None = None
    show: Callable[[float | None, int | None], str] = number
    compared: bool = True
    noise_tokens: Callable[[RunView], float] | None = None
    terminal: TerminalColumn | None = None


def _perplexity(view: RunView) -> float:
    return view.evaluation.perplexity if view.evaluation else math.nan


def _held_out(name: str) -> Callable[[RunView], float]:
    """Mean over layers (or domains) of a field of the evaluation."""

    def read(view: RunView) -> float:
        value = getattr(view.evaluation, name, None)
        return mean(_numbers(value)) if value is not None else math.nan

    return read


def _of_tenth(tenth: int) -> Callable[[RunView], float]:
    """Loss where a token of one tenth of the training text is read, 0 the most frequent."""

    def read(view: RunView) -> float:
        found = view.evaluation.loss_by_frequency.get("input") if view.evaluation else None
        return found[tenth] if found else math.nan

    return read


def _dead(view: RunView) -> float:
    known = _numbers(view.evaluation.dead_experts) if view.evaluation else []
    return math.fsum(known) if known else math.nan


def _numbers(value: object) -> list[float]:
    """All finite numbers in nested lists and dicts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [one for part in value for one in _numbers(part)]
    return [value] if is_number(value) else []  # type: ignore[list-item]


def _active_width(view: RunView) -> float:
    """Where it is not the same for every token, or every choice."""
    return view.active_width if view.header.expert_widths or view.config.get("model.top_p") else math.nan


def _experts_per_token(view: RunView) -> float:
    return view.experts_per_token if view.config.get("model.top_p") else math.nan


def _trained(name: str) -> Callable[[RunView], float]:
    return lambda view: view.trained(name)


def _speed(view: RunView) -> float:
    return view.over_steps(lambda step: step.tokens / step.seconds if step.seconds > 0 else math.nan)


def _seconds(view: RunView) -> float:
    return view.over_steps(lambda step: step.seconds if step.seconds > 0 else math.nan)


def _memory(view: RunView) -> float:
    return float(view.run.end.peak_memory_bytes) if view.run.end else math.nan


def _step_tokens(view: RunView) -> float:
    return mean(step.tokens for step in view.window)


def _micro_batch_tokens(view: RunView) -> float:
    micro_batches = view.config.get("train.micro_batches")
    return _step_tokens(view) / micro_batches if isinstance(micro_batches, int) and micro_batches > 0 else math.nan


def _sequence_tokens(view: RunView) -> float:
    length = view.config.get("data.sequence_length")
    return float(length) if isinstance(length, int) else math.nan


def _held_out_tokens(view: RunView) -> float:
    return math.fsum(view.evaluation.tokens.values()) if view.evaluation else math.nan


MAXVIO = "MaxVio = largest load of an expert / mean load − 1: 0 is even, 1 means that one expert works twice its share"

COMPARISON_COLUMNS = (
    Column("perplexity", "Perplexity", "Quality",
           "How many tokens the model still hesitates between on text it has not seen; domains count alike.",
           _perplexity, "lower", ratio=True, show=lambda value, _: fine_perplexity(value),
           terminal=TerminalColumn("perplexity", difference="vs {baseline}")),
    Column("bits_per_byte", "Bits per byte", "Quality",
           "The same loss, free of the tokenizer: bits needed for one byte of held-out text.",
           _held_out("bits_per_byte"), "lower", places=3, terminal=TerminalColumn("bits/byte", 3)),
    Column("loss_frequent", "Loss after frequent tokens", "Quality",
           "Held-out loss where the token that is read is one of the most frequent tenth of the training text.",
           _of_tenth(0), "lower", "nats", places=3),
    Column("loss_rare", "Loss after rare tokens", "Quality",
           "The same for the rarest tenth: what a routing mask by token id is meant to lower.",
           _of_tenth(-1), "lower", "nats", places=3),
    Column("train_loss", "Training loss", "Quality",
           "Mean cross-entropy over the last quarter of the steps, without the balance loss.",
           lambda view: mean(step.loss for step in view.window), "lower", "nats", places=3),
    Column("mutual_information", "Domain information", "Specialization",
           "Mutual information of expert and domain: what the choice of an expert tells about the domain of the text.",
           _held_out("mutual_information"), "higher", "nats", terminal=TerminalColumn("info", 3)),
    Column("mutual_information_shuffled", "… labels shuffled", "Specialization",
           "The same with the domain labels shuffled: what chance alone gives, so only the excess over it counts.",
           _held_out("mutual_information_shuffled"), "", "nats", compared=False,
           terminal=TerminalColumn("chance", 4)),
    Column("topk_score", "Top-K score", "Specialization",
           "Probability that the gate puts on the experts it chose: above K/E the router has an opinion.",
           _held_out("topk_score"), terminal=TerminalColumn("top-K", 3)),
    Column("routing_churn", "Routing churn", "Specialization",
           "Share of the choices on the same held-out text that changed since the evaluation before it.",
           _held_out("routing_churn"), places=3),
    Column("train_maxvio_global", "MaxVio, global batch", "Balance in training",
           f"{MAXVIO}; here per optimizer step, mean over the last quarter.",
           _trained("balance/maxvio_global"), "lower", noise_tokens=_step_tokens,
           terminal=TerminalColumn("global", 2, over="in training")),
    Column("train_maxvio_micro_batch", "MaxVio, micro-batch", "Balance in training",
           "The same inside one micro-batch. One domain may well prefer some experts, so lower is not better here.",
           _trained("balance/maxvio_micro_batch"), noise_tokens=_micro_batch_tokens,
           terminal=TerminalColumn("micro", 2, over="in training")),
    Column("train_maxvio_sequence", "MaxVio, sequence", "Balance in training",
           "The same inside one sequence, where specialists must show as imbalance.",
           _trained("balance/maxvio_sequence"), noise_tokens=_sequence_tokens,
           terminal=TerminalColumn("sequence", 2, over="in training")),
    Column("heldout_maxvio_global", "MaxVio, all text", "Balance on held-out text",
           "Load over all held-out text, every domain included: the straggler factor minus 1.",
           _held_out("maxvio_global"), "lower", noise_tokens=_held_out_tokens,
           terminal=TerminalColumn("all", 2, over="held-out text")),
    Column("heldout_maxvio_micro_batch", "MaxVio, micro-batch", "Balance on held-out text",
           "The same inside micro-batches of the training size.",
           _held_out("maxvio_micro_batch"), noise_tokens=_micro_batch_tokens,
           terminal=TerminalColumn("micro ", 2, over="held-out text")),
    Column("heldout_maxvio_sequence", "MaxVio, sequence", "Balance on held-out text",
           "The same inside single sequences.",
           _held_out("maxvio_sequence"), noise_tokens=_sequence_tokens,
           terminal=TerminalColumn("sequence ", 2, over="held-out text")),
    Column("dead_experts", "Dead experts", "Balance on held-out text",
           "Experts, over all layers, that no held-out token chose: weights that do nothing.",
           _dead, "lower", show=lambda value, _: count(value), terminal=TerminalColumn("dead")),
    Column("active_width", "Active width", "Cost",
           "Hidden units that a token's experts have together, mean over held-out tokens and layers.",
           _active_width, "lower", ratio=True, places=1, terminal=TerminalColumn("width", 1)),
    Column("experts_per_token", "Experts per token", "Cost",
           "Mean over held-out tokens and layers: with top-p a token may use fewer than K.",
           _experts_per_token, "", places=2, terminal=TerminalColumn("experts", 2)),
    Column("tokens_per_second", "Tokens per second", "Cost",
           "Training speed, median over the steps; evaluation and checkpoints left out.",
           _speed, "higher", ratio=True, places=0, terminal=TerminalColumn("tokens/s", 0)),
    Column("seconds_per_step", "Seconds per step", "Cost",
           "Wall time of one optimizer step, median.",
           _seconds, "lower", "s", ratio=True, terminal=TerminalColumn("s/step", difference="vs {baseline}")),
    Column("peak_memory", "Peak memory", "Cost",
           "Most memory that the training process held.",
           _memory, "lower", "bytes", ratio=True, show=lambda value, _: bytes_text(value),
           terminal=TerminalColumn("memory")),
)  # fmt: skip
