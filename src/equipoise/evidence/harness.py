"""The one door to EleutherAI's evaluation harness, lm-eval: an exported model answers questions of a task folder."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import DataError
from ..lab.models.pretrained import quiet_transformers
from .downstream_tasks import CHOICES, METRIC

__all__ = ["Answer", "Harness", "require_harness"]

PACKAGE = "lm_eval"


class Answer(NamedTuple):
    """What the harness said of one question: each choice's log-probability, and whether the true one gained most."""

    question: int
    after_prefix: list[float]  # nats
    alone: list[float]  # nats, at the beginning of a document
    correct: bool


def require_harness() -> str:
    """The harness' version. Raises ModuleNotFoundError where it is not installed."""
    importlib.import_module(PACKAGE)
    return version(PACKAGE)


class Harness:
    """A model of a Hugging Face folder and the tasks of a folder, for the harness' `evaluate`. Nothing is fetched.

    Its `simple_evaluate` is `evaluate` and what is around it: it lists the machine's hardware and packages each time,
    as much work as dozens of questions to a small model.

    Args:
        model: a folder that `export_run` wrote.
        tasks: a folder that `write_tasks` wrote.
        device: as torch names it.
        batch: sequences that go through the model at a time.

    Raises DataError where the harness cannot load the model or its tokenizer.
    """

    def __init__(self, model: Path, tasks: Path, *, device: str = "cpu", batch: int = 32) -> None:
        with _quiet():
            from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
            from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

            try:
                self._model: Any = HFLM(str(model), device=device, batch_size=batch)
            except Exception as error:  # of many kinds, by the class and the tokenizer
                raise DataError(
                    expected="an exported model and a tokenizer that lm-eval loads",
                    got=f"{type(error).__name__}: {error}".partition("\n")[0][:200],
                    do="check that AutoModelForCausalLM and AutoTokenizer load what `equipoise export` makes of it",
                ) from None
            self._loaded: dict[str, Any] = {}
            self._manager: Any = TaskManager(include_path=str(tasks), include_defaults=False)

    def answer(self, task: str, questions: Sequence[int]) -> list[Answer]:
        """Answers these questions, by their line in the task's file; in the same order."""
        from lm_eval import evaluate  # pyright: ignore[reportMissingImports]

        with _quiet():
            if task not in self._loaded:  # its file is read once
                self._loaded[task] = self._manager.load([task])
            asked = {task: list(questions)}
            found: Any = evaluate(lm=self._model, task_dict=self._loaded[task], samples=asked, bootstrap_iters=0)
        answers = [
            Answer(one["doc_id"], nats[:CHOICES], nats[CHOICES:], bool(one[METRIC]))
            for one in found["samples"][task]
            for nats in [[float(said[0]) for said in one["filtered_resps"]]]
        ]
        assert [one.question for one in answers] == list(questions)
        return answers


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Its bars, warnings and log lines stay away from ours; what fails is raised."""
    level = logging.getLogger(PACKAGE).level
    logging.getLogger(PACKAGE).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), quiet_transformers():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger(PACKAGE).setLevel(level)
