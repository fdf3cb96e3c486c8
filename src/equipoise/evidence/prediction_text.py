"""A prediction in a terminal, 80 columns wide, and as JSON."""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..report.text.table import table, wrap
from .prediction import LAW, Gain, Prediction, Scope

__all__ = ["Source", "check_command", "prediction_json", "render_prediction"]

SEEDS = 8
MINUTES, TOKENS = 2, 8192  # of a run of the lab, tokens of its step; lab-notes/2026-11-29-evidence.md
STEP = 32  # sequences in every step that the law was fitted to


@dataclass(frozen=True)
class Source:
    """What was read: the path as it was typed (None: the text of this installation), domains, and how."""

    data: str | None
    domains: Sequence[str]
    chosen: Sequence[str] = ()  # that the user named
    cut_off: Sequence[str] = ()
    max_bytes: int = 0
    own_tokenizer: bool = False


def render_prediction(found: Prediction, source: Source) -> str:
    """The answer, a table of scopes, what is unlike the law's runs, the law, its limits, and how to check it.

    >>> from .diversity import Diversity
    >>> from .prediction import Step
    >>> text = Diversity(square=0.0067, between=0.0, within=0.0039, within_error=0.0, tokens=256, windows=9000)
    >>> said = render_prediction(Prediction(text, Step(micro_batch=2, ranks=4)), Source("mine.jsonl", ["mine"]))
    >>> said.splitlines()[0]
    'Cannot tell whether the global scope is worth anything to you: the prediction is'
    """
    text, domains = found.text, len(source.domains)
    rows = [[one.name, f"{one.sequences:,}", f"{one.gap:.3f}", _gain(one)] for one in found.scopes]
    kind = "each of any domain" if found.step.mixed else "a micro-batch is of one domain"
    note = (
        f"gap: how unlike all text such a batch is, from {text.windows:,} sequences of {text.tokens:,} tokens of "
        f"{source.data or 'the text of this installation'} ({domains} domain{'s' * (domains != 1)}; {kind}). "
        "Nothing was trained."
    )
    head = ["a balance loss over", "sequences", "gap", "gain, nats (95 %)"]
    parts = [wrap(_answer(found.gain)), table("What each scope is worth, against one micro-batch", head, rows, note)]
    parts += [wrap(f"WARNING {name}: {said}.", "  ") for name, said in _warnings(found, source).items()]
    parts += [wrap(_law(), "  "), wrap(f"limits: {_limits()}", "  "), _check(found, source)]
    return "\n\n".join(parts) + "\n"


def prediction_json(found: Prediction, source: Source) -> dict[str, Any]:
    """All of it for machines: gains in nats per token, positive where the held-out loss is lower."""
    law = asdict(LAW) | {"settings": dict(LAW.settings)}
    return {
        "gain": _numbers(found.gain),
        "scopes": [
            {"name": one.name, "sequences": one.sequences, "gap": one.gap, **_numbers(one.gain)} for one in found.scopes
        ],
        "fall": found.fall,
        "text": found.text._asdict() | {"data": source.data, "domains": list(source.domains)},
        "step": asdict(found.step) | {"sequences": found.step.sequences},
        "warnings": _warnings(found, source),
        "law": law,
        "limits": _limits(),
        "check": check_command(found, source),
    }


def check_command(found: Prediction, source: Source) -> str:
    """The comparison that measures what is predicted here, on the same text.

    >>> from .diversity import Diversity
    >>> from .prediction import Step
    >>> text = Diversity(square=0.0067, between=0.0, within=0.0, within_error=0.0, tokens=512, windows=9000)
    >>> print(check_command(Prediction(text, Step(micro_batch=2, ranks=4)), Source("a b.jsonl", ["x", "y"])))
    equipoise compare --data 'a b.jsonl' --strategies micro,global --seeds 8 --set
        train.micro_batches=4 --set train.sequences_per_micro_batch=2 --set data.mix=sequence --set
        data.sequence_length=512
    """
    step = found.step
    words = ["equipoise", "compare", *(["--data", source.data] if source.data is not None else [])]
    only = source.chosen or (source.domains if len(source.domains) == 1 else ())
    words += ["--domains", ",".join(only)] if only else []
    words += ["--strategies", "micro,global", "--seeds", str(SEEDS)]
    settings: dict[str, Any] = {"train.micro_batches": step.micro_batches}
    settings["train.sequences_per_micro_batch"] = step.micro_batch
    settings["data.mix"] = "sequence" if step.mixed else "micro_batch"
    if found.text.tokens != LAW.settings["data.sequence_length"]:
        settings["data.sequence_length"] = found.text.tokens
    return shlex.join([*words, *(part for name, value in settings.items() for part in ("--set", f"{name}={value}"))])


def _numbers(gain: Gain) -> dict[str, Any]:
    return {"nats": gain.value, "low": gain.low, "high": gain.high, "says": gain.says}


def _answer(gain: Gain) -> str:
    size = f"{gain.value:.3f} ± {gain.half:.3f} nats"
    if gain.says == "cannot tell":
        return (
            f"Cannot tell whether the global scope is worth anything to you: the prediction is {size}, and that holds "
            f"zero ({gain.low:+.3f} to {gain.high:+.3f})."
        )
    return (
        f"The global scope is worth {size} to you: a held-out loss lower by {gain.low:.3f} to {gain.high:.3f} than "
        "with a balance loss over each micro-batch, 95 times in 100."
    )


def _gain(scope: Scope) -> str:
    return f"{scope.gain.value:+.4f} ± {scope.gain.half:.4f}" if scope.gain.half else "0"


def _warnings(found: Prediction, source: Source) -> dict[str, str]:
    told = dict(found.warnings)
    if source.own_tokenizer:
        size = LAW.settings["model.vocab_size"]
        told["tokenizer"] = f"gaps are of your tokenizer's ids, those of the law of {size} ids trained on its text"
    if len(source.domains) == 1:
        told["one domain"] = (
            f"all text is of the domain {source.domains[0]!r}, so that only its sequences differ; the law's one such "
            "cell was measured at 0.001 ± 0.023"
        )
    if source.cut_off:
        told["in part"] = (
            f"of {len(source.cut_off)} domain{'s' * (len(source.cut_off) != 1)} the first {source.max_bytes:,} bytes "
            "were read (--max-bytes): text that is sorted has to be shuffled first"
        )
    return told


def _law() -> str:
    return (
        f"law: gain = c · (gap of a micro-batch - gap of the wider batch), c = {LAW.c:.4f} ± {LAW.error:.4f} nats, "
        f"fitted to {LAW.cells} cells of {LAW.pairs} pairs of runs (claims {' and '.join(LAW.source)}); cells that it "
        f"had not seen it missed by {LAW.unseen:.4f}. The intervals hold both errors."
    )


def _limits() -> str:
    at = LAW.settings
    return (
        f"measured at one size of model ({at['model.layers']} layers, width {at['model.width']}, "
        f"{at['model.experts']} experts, top-{at['model.top_k']}), for {at['train.steps']} steps of {STEP} sequences "
        f"of {at['data.sequence_length']} tokens, on one text and parts of it, both scopes with the same coefficient. "
        "For larger models, longer trainings and coefficients tuned for each scope c is not known. Domains count alike."
    )


def _check(found: Prediction, source: Source) -> str:
    each = max(1, round(MINUTES * found.step.sequences * found.text.tokens / TOKENS))
    took = f"{each} minute{'s' * (each != 1)}" if each < 120 else f"{each / 60:,.0f} hours"
    names = "" if source.data is None else "; text has to name its domains there"
    said = wrap(f"check: {2 * SEEDS} runs of about {took} on a core{names}", "  ")
    lines = textwrap.wrap(check_command(found, source), 76, initial_indent="  ", subsequent_indent="    ",
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return said + "\n" + " \\\n".join(lines)  # what is copied into a shell still runs
