"""The run file: typed records, one JSON object a line, written as a run goes and read by every report. No torch.

A line is ``{"kind": ..., **fields}``. The first is the header, which carries the schema version. A line goes to the
file as soon as it is written: a killed run loses at most the line it was writing, and the reader shows all it can read.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..errors import DataError, OutputError
from .codec import FieldError, MissingField, Rules, decode, without_nan
from .files import write_whole
from .locks import is_free

__all__ = [
    "RECORD_NAME",
    "SCHEMA_VERSION",
    "End",
    "Evaluation",
    "Fidelity",
    "Header",
    "Load",
    "Record",
    "RecordWriter",
    "Run",
    "Step",
    "begun",
    "read_run",
]

SCHEMA_VERSION = 1
RECORD_NAME = "record.jsonl"


@dataclass(frozen=True)
class Header:
    """What a run is; enough to run it again. ``resumed_at`` > 0 marks the header of a resumed part."""

    strategy: str  # short name, e.g. "global+micro"
    policies: list[str]  # one line a policy, as repr'd
    seed: int
    config: dict[str, Any]  # the full configuration
    num_layers: int  # MoE layers
    num_experts: int
    top_k: int
    domains: list[str]
    corpus_sha256: str
    versions: dict[str, str]  # python, torch, equipoise, ...
    parameters: int  # all
    active_parameters: int  # those one token uses
    started: str  # ISO 8601, UTC
    resumed_at: int = 0
    schema: int = SCHEMA_VERSION
    expert_widths: list[int] = field(default_factory=list)  # of a layer's experts; empty where they are alike
    task: str = "text"  # what it models; "images": a domain is a noise level, a loss the error of the flow


@dataclass(frozen=True)
class Step:
    """One optimizer step. ``balance`` is what ``Balancer.metrics()`` returned: flat names, plain numbers."""

    step: int  # 1 = after the first optimizer step
    loss: float  # mean cross-entropy over the step's tokens, nats
    lr: float
    grad_norm: float
    tokens: int  # in this step
    seconds: float  # wall time of this step, evaluation and checkpoints left out
    balance: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Load:
    """How many (token, choice) pairs picked each expert in one global batch: [num_layers][num_experts]."""

    step: int
    counts: list[list[int]]


@dataclass(frozen=True)
class Fidelity:
    """Gradient of the balance loss under each estimator of f against ``exact``, at the router logits of one step."""

    step: int
    relative_error: dict[str, float]  # estimator -> |g - g_exact| / |g_exact|
    cosine: dict[str, float]
    in_use: list[str]  # the estimators that this run trains with


@dataclass(frozen=True)
class Evaluation:
    """Held-out text at one step. Lists follow ``Header.domains`` and the layers."""

    step: int
    loss: dict[str, float]  # domain -> nats per token
    bits_per_byte: dict[str, float]
    tokens: dict[str, int]
    counts: list[list[list[int]]]  # [domain][layer][expert] (token, choice) pairs
    topk_score: list[list[float]]  # [domain][layer] mean over tokens of the sum of the top-K gate probabilities
    maxvio_sequence: list[float]  # [layer] mean over sequences
    maxvio_micro_batch: list[float]  # [layer] mean over micro-batches of the training size
    maxvio_global: list[float]  # [layer] over all held-out text
    dead_experts: list[int]  # [layer] experts that no held-out token picked
    mutual_information: list[float]  # [layer] nats between expert and domain
    mutual_information_shuffled: list[float]  # the same with shuffled domain labels: the floor
    # [layer] share of choices that changed since the evaluation before; empty at the first, and in older records
    routing_churn: list[float] = field(default_factory=list)
    # "input", "target" -> nats per token where the token that is read, or predicted, is of each tenth of the training
    # text, the most frequent ids first; NaN for a tenth without a token. Older records have none
    loss_by_frequency: dict[str, list[float]] = field(default_factory=dict)
    # of text and images: experts per token by modality, and where experts choose their tokens, the loss of that choice
    # and what auxiliary routers get right of it
    choices: dict[str, float] = field(default_factory=dict)

    @property
    def mean_loss(self) -> float:
        """Mean over domains, each with the same weight (nats per token)."""
        return sum(self.loss.values()) / len(self.loss) if self.loss else math.nan

    @property
    def perplexity(self) -> float:
        return math.inf if self.mean_loss > 700 else math.exp(self.mean_loss)  # exp(710) is no float


@dataclass(frozen=True)
class End:
    """How the run ended: ``finished``, ``interrupted`` or ``failed`` (with the message)."""

    step: int
    status: str
    seconds: float  # training wall time, all parts, without evaluation
    tokens: int
    peak_memory_bytes: int
    message: str = ""


Record = Header | Step | Load | Fidelity | Evaluation | End
KINDS: dict[str, type] = {
    "header": Header, "step": Step, "load": Load, "fidelity": Fidelity, "evaluation": Evaluation, "end": End,
}  # fmt: skip
NAMES = {cls: kind for kind, cls in KINDS.items()}
# NaN and infinity are null in the file, are read back as NaN, and the reports show a gap.
RULES = Rules(null_is_nan=True, unknown_fields=True)


class RecordWriter:
    """Appends records to ``folder/record.jsonl``; a line is in the file when ``write`` returns, or no part of it is.

    ``keep_until`` drops the records of later steps first: a resumed run writes those steps again.
    """

    def __init__(self, folder: str | Path, *, keep_until: int | None = None) -> None:
        self.path = Path(folder) / RECORD_NAME
        try:
            if keep_until is not None and self.path.exists():
                _truncate(self.path, keep_until)
            broken = _ends_inside_a_line(self.path)
            self._file = open(self.path, "ab", buffering=0)  # no buffer: nothing is left behind when the disk is full
        except OSError as error:
            raise _cannot_write(self.path, error) from None
        if broken:
            self._append(b"\n")

    def write(self, record: Record) -> None:
        # ASCII only: a domain name may hold a line separator or bytes of a file name that are not UTF-8
        line = json.dumps({"kind": NAMES[type(record)], **without_nan(asdict(record))}, allow_nan=False)
        self._append(line.encode() + b"\n")

    def _append(self, line: bytes) -> None:
        start = self._file.seek(0, os.SEEK_END)
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with contextlib.suppress(OSError):  # a device cannot be truncated; the reader skips a half line
                self._file.truncate(start)
            raise _cannot_write(self.path, error) from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass
class Run:
    """All records of one run, in order. ``problems`` lists the lines that could not be read, and why."""

    path: Path
    header: Header
    steps: list[Step] = field(default_factory=list)
    loads: list[Load] = field(default_factory=list)
    fidelities: list[Fidelity] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    end: End | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def status(self) -> str:
        """``finished``, ``interrupted``, ``failed``, or ``running`` while no end was written and its folder is held."""
        if self.end is not None:
            return self.end.status
        return "interrupted" if is_free(self.path if self.path.is_dir() else self.path.parent) else "running"


def begun(folder: Path) -> bool:
    """Whether a run came past the first line of its record: one that was killed inside it has trained nothing.

    >>> begun(Path("nowhere"))
    False
    """
    path = folder / RECORD_NAME
    return path.is_file() and b"\n" in path.read_bytes()


def read_run(path: str | Path, task: str = "text") -> Run:
    """Reads a run folder or a record file. Bad lines are reported in ``problems`` and skipped.

    Raises DataError when there is no file, no readable header, a newer schema than this version knows, or a run of
    another task.
    """
    path = Path(path)
    file = path / RECORD_NAME if path.is_dir() else path
    try:
        text = file.read_bytes().decode("utf-8", errors="replace")
    except OSError as error:
        raise DataError(expected=f"a run record at {file}", got=error.strerror or str(error),
                        do="pass the folder of a run that `equipoise train` or `compare` wrote") from None  # fmt: skip
    run: Run | None = None
    problems: list[str] = []
    for number, record in _parse(text, file, problems):
        match record:
            case Header():
                if run is None:
                    run = Run(file.parent, record, problems=problems)
                run.end = None  # a resumed part: the earlier end no longer holds
            case _ if run is None:
                problems.append(f"line {number}: a record before the header")
            case Step():
                run.steps.append(record)
            case Load():
                run.loads.append(record)
            case Fidelity():
                run.fidelities.append(record)
            case Evaluation():
                run.evaluations.append(record)
            case End():
                run.end = record
    if run is None:
        raise DataError(expected=f"a header record in {file}", got=problems[0] if problems else "an empty file",
                        do="pass another run, or train this one again")  # fmt: skip
    if run.header.task != task:
        raise DataError(expected=f"a run of {task} in {file.parent}", got=f"a run of {run.header.task}",
                        do="`equipoise diffuse` reads runs of images, `equipoise fuse` those of text and images, every "
                           "other command those of text")  # fmt: skip
    return run


def _parse(text: str, file: Path, problems: list[str]) -> Iterator[tuple[int, Record]]:
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines() would also cut at U+2028 inside a name
        if not line.strip():
            continue
        try:
            yield number, _record(json.loads(line), file)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            if isinstance(error, DataError):
                raise
            problems.append(f"line {number}: {str(error)[:120]}")


def _record(data: Any, file: Path) -> Record:
    """The record of one line; fields that this version does not know are dropped. Raises ValueError for a bad one."""
    if not isinstance(data, dict) or (kind := data.get("kind")) not in KINDS:
        raise ValueError(f"not one of the kinds {', '.join(KINDS)}")
    cls = KINDS[kind]
    if cls is Header and isinstance(schema := data.get("schema"), int) and schema > SCHEMA_VERSION:
        raise DataError(expected=f"record schema <= {SCHEMA_VERSION} in {file}", got=f"schema {schema}",
                        do="update equipoise")  # fmt: skip
    try:
        return decode(cls, data, RULES)
    except MissingField as error:
        raise ValueError(f"{kind} without {error.path!r}") from None
    except FieldError as error:
        raise ValueError(f"{kind} with {error.path!r} that is not {error.expected}: {error.got}") from None


def _ends_inside_a_line(path: Path) -> bool:
    """Whether the last line is the half-written one of a killed run: the next record must not be glued to it."""
    if not path.is_file() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _truncate(path: Path, keep_until: int) -> None:
    """Rewrites the file without the records of steps after ``keep_until``."""
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            step = json.loads(line).get("step", 0)
            if step <= keep_until:
                kept.append(line + b"\n")
        except (ValueError, TypeError, AttributeError):
            continue  # the half-written last line of a killed run
    write_whole(path, b"".join(kept))


def _cannot_write(path: Path, error: OSError) -> OutputError:
    return OutputError(expected=f"to write {path}", got=error.strerror or str(error),
                       do="free disk space or choose another folder; everything written before is kept")  # fmt: skip
