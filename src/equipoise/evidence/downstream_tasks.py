"""Two multiple-choice tasks from held-out text: which of four continuations is the one that a prefix had.

The three others are continuations of other held-out windows, of the same domain in one task and of other domains in the
other. All four are of equally many tokens and begin with white space, so that neither length nor half a word tells them
apart, and the harness cuts prefix and continuation where they were cut here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import ConfigError, DataError
from ..lab.data.packing import PackedData
from ..lab.data.tokenizer import END_ID
from ..storage.files import atomic_write

__all__ = ["CHOICES", "METRIC", "OTHERS", "SAME", "TASKS", "Question", "TaskSizes", "make_questions", "write_tasks"]

SAME, OTHERS = "equipoise_same_domain", "equipoise_other_domains"  # as the harness names them
TASKS = (SAME, OTHERS)
CHOICES = 4
METRIC = (
    "acc_mutual_info"  # a choice's log-probability after the prefix minus the one without: how much the prefix says
)
METRICS = (METRIC, "acc")  # the second, of the first log-probability alone, prefers text that is likely anywhere
DRAWS = 50  # until another continuation fits; a text that repeats itself has few


@dataclass(frozen=True)
class TaskSizes:
    """How questions are cut: tokens of a prefix and of a continuation, and how many questions of a domain at most."""

    prefix: int
    continuation: int
    per_domain: int
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("prefix", 1), ("continuation", 1), ("per_domain", CHOICES)):
            value = getattr(self, name)
            if value < least:
                option = {"per_domain": "questions"}.get(name, name)
                raise ConfigError(expected=f"--{option} of {least} or more", got=str(value), do="raise it")


class Question(NamedTuple):
    """A prefix, four continuations, and which of them (0 to 3) is the true one."""

    domain: str
    prefix: str
    choices: list[str]
    answer: int


class _Piece(NamedTuple):
    prefix: str
    continuation: str
    prefix_ids: list[int]
    continuation_ids: list[int]


def make_questions(
    data: PackedData, tokenizer: Any, sizes: TaskSizes, *, end: int = END_ID
) -> dict[str, list[Question]]:
    """The questions of each task, from at most one place in each held-out window; the same ones for the same arguments.

    Args:
        tokenizer: the one that ``data`` was cut with, of the package tokenizers.
        end: the id that ends a document; no question reaches over one.

    With a single domain there is only the task ``SAME``. Raises ConfigError for sizes that a window cannot hold,
    DataError for a domain with fewer than four places to ask at.
    """
    room = data.sequence_length + 1
    if sizes.prefix + sizes.continuation > room:
        raise ConfigError(
            expected=f"a prefix and a continuation of {room} tokens together, a window of this text",
            got=f"{sizes.prefix} and {sizes.continuation}",
            do="lower --prefix or --continuation",
        )
    pieces = {domain: _pieces(data.heldout[domain].tolist(), tokenizer, sizes, end) for domain in data.domains}
    for domain, found in pieces.items():
        if len(found) < CHOICES:
            raise DataError(
                expected=f"{CHOICES} places in the held-out text of {domain!r} where a word ends inside one document",
                got=f"{len(found)} in {len(data.heldout[domain])} windows",
                do="lower --prefix and --continuation, or train on more text of that domain",
            )
    made = {}
    for task in TASKS if len(pieces) > 1 else (SAME,):
        rng = random.Random(f"{sizes.seed} {task}")
        drawn = [
            _question(domain, piece, _pools(task, domain, pieces, rng), tokenizer, rng)
            for domain, found in pieces.items()
            for piece in found
        ]
        made[task] = [question for question in drawn if question is not None]
    return made


def write_tasks(folder: Path, questions: dict[str, list[Question]]) -> None:
    """``TASK.jsonl`` and ``TASK.yaml`` for each task: `lm_eval --include_path FOLDER --tasks TASK` runs them as well.

    Raises OutputError when they cannot be written.
    """
    for task, of_task in questions.items():
        rows = folder / f"{task}.jsonl"
        lines = [json.dumps(question._asdict()) + "\n" for question in of_task]
        atomic_write(rows, "".join(lines).encode())
        settings = {
            "task": task,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(rows.resolve())}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "prefix",
            "doc_to_choice": "choices",
            "doc_to_target": "answer",
            "target_delimiter": "",
            "num_fewshot": 0,
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in METRICS],
        }
        atomic_write(folder / f"{task}.yaml", json.dumps(settings, indent=1).encode())  # JSON is YAML


def _pieces(windows: Sequence[list[int]], tokenizer: Any, sizes: TaskSizes, end: int) -> list[_Piece]:
    found: list[_Piece] = []
    for window in windows:
        if len(found) == sizes.per_domain:
            break
        piece = _piece(window, tokenizer, sizes, end)
        if piece is not None:
            found.append(piece)
    return found


def _piece(window: list[int], tokenizer: Any, sizes: TaskSizes, end: int) -> _Piece | None:
    """The first place of a window where a word ends, no document does, and the text has these very tokens again."""
    for cut in range(sizes.prefix, len(window) - sizes.continuation + 1):
        before, after = window[cut - sizes.prefix : cut], window[cut : cut + sizes.continuation]
        if end in before or end in after:
            continue
        prefix, whole = (tokenizer.decode(ids, skip_special_tokens=False) for ids in (before, before + after))
        continuation = whole[len(prefix) :]
        # the harness moves white space at the end of a prefix to the continuation
        ends_word = continuation[:1].isspace() and continuation.strip() and prefix.strip() and prefix == prefix.rstrip()
        if ends_word and _ids(tokenizer, prefix) == before and _ids(tokenizer, prefix + continuation) == before + after:
            return _Piece(prefix, continuation, before, after)
    return None


def _pools(task: str, domain: str, pieces: dict[str, list[_Piece]], rng: random.Random) -> list[list[_Piece]]:
    """Where each wrong choice is drawn from: as many other domains as there are, each as often."""
    if task == SAME:
        return [pieces[domain]] * (CHOICES - 1)
    others = [name for name in pieces if name != domain]
    rng.shuffle(others)
    return [pieces[others[i % len(others)]] for i in range(CHOICES - 1)]


def _question(
    domain: str, piece: _Piece, pools: list[list[_Piece]], tokenizer: Any, rng: random.Random
) -> Question | None:
    """None where no other continuation can stand in this place, as in text that says one thing over and over."""
    choices = [piece.continuation]
    for pool in pools:
        for _ in range(DRAWS):
            other = rng.choice(pool)
            joined = piece.prefix_ids + other.continuation_ids
            if other.continuation not in choices and _ids(tokenizer, piece.prefix + other.continuation) == joined:
                choices.append(other.continuation)
                break
        else:
            return None
    rng.shuffle(choices)
    return Question(domain, piece.prefix, choices, choices.index(piece.continuation))


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids
