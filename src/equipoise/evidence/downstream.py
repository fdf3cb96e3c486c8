"""Exported runs answer questions on their held-out text, through EleutherAI's harness; each answer is kept at once.

OUT/request.json    which text, which questions        OUT/tasks/    the questions, as the harness reads them
OUT/answers/        a file for each set of weights     OUT/downstream.json    accuracies and differences
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, OutputError
from ..lab.config.schema import RunConfig, from_dict
from ..lab.config.strategies import slug
from ..lab.data.corpus import Progress
from ..lab.data.packing import PackedData
from ..lab.data.tokenizer import END_ID, given_tokenizer, load_tokenizer
from ..lab.models.hf_export import LAST, export_run
from ..lab.models.pretrained import prepare_text
from ..report.data.load import load_runs
from ..storage.files import atomic_write, output_errors, sha256
from ..storage.locks import locked
from ..storage.run_record import Run
from .downstream_results import Answered, to_json
from .downstream_tasks import METRIC, Question, TaskSizes, make_questions, write_tasks
from .harness import Answer, Harness, require_harness

__all__ = ["RESULT_NAME", "Found", "Request", "evaluate", "finished_runs"]

REQUEST_NAME, RESULT_NAME, TASKS_FOLDER, ANSWERS_FOLDER = "request.json", "downstream.json", "tasks", "answers"
EXPORT = ".export-"  # begins the name of the folder that holds a model while it is asked
FORMAT = 1  # raise it when other questions are made of the same text
AT_A_TIME = 32  # questions between two saves

OnAnswers = Callable[[str, int, int], None]  # run, questions answered, questions in all


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked. Sizes in tokens; None: half a window of the run's text, and an eighth."""

    prefix: int | None = None
    continuation: int | None = None
    questions: int = 100  # of a domain, or as many as it has held-out windows
    seed: int = 0  # of what the wrong choices are
    checkpoint: str | int = LAST
    baseline: str | None = None
    device: str = "cpu"
    batch: int = 32


@dataclass(frozen=True)
class Found:
    """All answers: per run and question, in the order of the runs, and the strategy that others are compared with."""

    runs: list[Answered]
    baseline: str
    questions: dict[str, list[Question]]


def finished_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs of these folders, and a sentence for each run that was left out.

    Raises DataError where a folder holds no run, where none has finished, and for runs of different text; ConfigError
    for a strategy that comes twice with one seed.
    """
    runs, problems = load_runs(folders)
    done = [run for run in runs if run.status == "finished"]
    left_out = [run for run in runs if run.status != "finished"]
    problems += [f"{run.path.name}: left out, {run.status} at step {_step(run)}" for run in left_out]
    if not done:
        first = left_out[0]
        raise DataError(
            expected=f"a finished run in {', '.join(map(str, folders))}",
            got=f"{first.path.name}, {first.status} at step {_step(first)}",
            do=f"let it finish: equipoise resume {first.path}",
        )
    texts = {json.dumps(_text(run), sort_keys=True): run for run in done}
    if len(texts) > 1:
        one, other = list(texts.values())[:2]
        differ = [name for name, value in _text(one).items() if value != _text(other)[name]]
        raise DataError(
            expected="runs on the same text, cut in the same way: the questions are made of it",
            got=f"{one.path.name} and {other.path.name}, which differ in {', '.join(differ)}",
            do="evaluate them in two calls",
        )
    known: dict[tuple[str, int], Run] = {}
    for run in done:
        earlier = known.setdefault((run.header.strategy, run.header.seed), run)
        if earlier is not run:
            raise ConfigError(
                expected="each strategy once for each seed",
                got=f"{run.header.strategy!r} with seed {run.header.seed} in {earlier.path} and in {run.path}",
                do="name one of the two",
            )
    return done, problems


def evaluate(
    request: Request,
    runs: Sequence[Run],
    out: Path,
    *,
    on_text: Progress | None = None,
    on_answers: OnAnswers | None = None,
) -> Found:
    """Answers what is not answered yet, writes ``out/downstream.json``, and returns all answers.

    A run's answers belong to its weights: the same run trained further, or again, begins anew. Stopped at any moment,
    the same call goes on.

    Args:
        runs: as `finished_runs` gives them.

    Raises ModuleNotFoundError without the harness, DataError where the text is not the one that the runs were trained
    on, OutputError for a folder with other questions, and what `make_questions` and `export_run` raise.
    """
    harness = require_harness()
    baseline = _baseline(request, runs)
    config = from_dict(RunConfig, runs[0].header.config)
    data, end = _own_text(runs[0], config, on_text)
    sizes = TaskSizes(
        request.prefix if request.prefix is not None else max(1, data.sequence_length // 2),
        request.continuation if request.continuation is not None else max(1, data.sequence_length // 8),
        request.questions,
        request.seed,
    )
    key = {"format": FORMAT, **_text(runs[0]), **asdict(sizes)}
    with locked(out):
        _claim(out, key)
        for killed in out.glob(f"{EXPORT}*"):
            shutil.rmtree(killed, ignore_errors=True)
        if on_text:
            on_text("making questions", 0.0)
        tokenizer = load_tokenizer(data.tokenizer_path, given=config.model.folder is not None)
        questions = make_questions(data, tokenizer, sizes, end=end)
        write_tasks(out / TASKS_FOLDER, questions)
        found = Found(
            [_answered(run, request, out, questions, on_answers or _silent) for run in runs], baseline, questions
        )
        settings = {**key, "device": request.device, "lm_eval": harness, "metric": METRIC}
        content = to_json(found.runs, baseline, questions, settings)
        atomic_write(out / RESULT_NAME, json.dumps(content, indent=1).encode())
    return found


def _answered(
    run: Run, request: Request, out: Path, questions: Mapping[str, Sequence[Question]], on_answers: OnAnswers
) -> Answered:
    """One run's answers; the model is exported beside them and removed again."""
    header = run.header
    name = f"{header.strategy}, seed {header.seed}"
    with tempfile.TemporaryDirectory(prefix=EXPORT, dir=out) as temporary:
        exported = export_run(run.path, Path(temporary) / "model", which=request.checkpoint)
        weights = _digest(exported.folder)
        path = out / ANSWERS_FOLDER / f"{slug(header.strategy)}-seed{header.seed}-{weights[:10]}.jsonl"
        known = _read_answers(path)
        total = sum(map(len, questions.values()))
        wanted = {
            task: [i for i in range(len(of_task)) if i not in known.get(task, {})]
            for task, of_task in questions.items()
        }
        done = total - sum(map(len, wanted.values()))
        on_answers(name, done, total)
        if done < total:
            model = Harness(exported.folder, out / TASKS_FOLDER, device=request.device, batch=request.batch)
            for task, missing in wanted.items():
                for start in range(0, len(missing), AT_A_TIME):
                    answers = model.answer(task, missing[start : start + AT_A_TIME])
                    _append(path, task, answers)
                    known.setdefault(task, {}).update({one.question: one for one in answers})
                    done += len(answers)
                    on_answers(name, done, total)
    right = {task: [known[task][i].correct for i in range(len(of_task))] for task, of_task in questions.items()}
    return Answered(str(run.path), header.strategy, header.seed, exported.step, weights, right)


def _own_text(run: Run, config: RunConfig, on_text: Progress | None) -> tuple[PackedData, int]:
    """The packed text of a run and the id that ends its documents."""
    data = prepare_text(config.model, config.data, on_text)
    if data.corpus_sha256 != run.header.corpus_sha256:
        raise DataError(
            expected=f"the text that {run.path.name} was trained on, {run.header.corpus_sha256[:12]}",
            got=f"{data.corpus_sha256[:12]}: this installation or the files of --data are other ones",
            do="evaluate with the packages that trained it, or train again here",
        )
    return data, END_ID if config.model.folder is None else given_tokenizer(config.model.folder).end


def _text(run: Run) -> dict[str, Any]:
    """What decides which held-out text a run has and how it is cut."""
    config = from_dict(RunConfig, run.header.config)
    return {
        "text": run.header.corpus_sha256,
        "vocabulary": config.model.vocab_size,
        "sequence_length": config.data.sequence_length,
        "folder": config.model.folder,
    }


def _baseline(request: Request, runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(run.header.strategy for run in runs))
    if request.baseline is None:
        return "micro" if "micro" in names else names[0]
    if request.baseline not in names:
        raise ConfigError(
            expected=f"--baseline with a strategy of these runs: {', '.join(names)}",
            got=repr(request.baseline),
            do="choose one of them",
        )
    return request.baseline


def _claim(out: Path, key: dict[str, Any]) -> None:
    """Raises OutputError for a folder with other questions, whose answers would be mixed with these."""
    path = out / REQUEST_NAME
    try:
        earlier = json.loads(path.read_bytes())
    except (OSError, ValueError):
        earlier = None
    if isinstance(earlier, dict) and earlier != key:
        names = [name for name in {**key, **earlier} if earlier.get(name) != key.get(name)]
        raise OutputError(
            expected=f"a new folder, or one with answers to these questions: {out}",
            got=f"answers to questions with another {', '.join(names)}",
            do="choose another --out",
        )
    atomic_write(path, json.dumps(key, indent=1).encode())


def _read_answers(path: Path) -> dict[str, dict[int, Answer]]:
    """task -> question -> answer; a line that a killed process left half written is passed over."""
    found: dict[str, dict[int, Answer]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            one = json.loads(line)
            task = one.pop("task")
            found.setdefault(task, {})[one["question"]] = Answer(**one)
        except (ValueError, KeyError, TypeError):
            continue
    return found


def _append(path: Path, task: str, answers: Sequence[Answer]) -> None:
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            # begins with a line end: what a killed process left there stays a line of its own
            file.write("".join("\n" + json.dumps({"task": task, **one._asdict()}) for one in answers) + "\n")


def _digest(folder: Path) -> str:
    """Of all files of weights, in the order of their names."""
    return hashlib.sha256("".join(sha256(path) for path in sorted(folder.glob("*.safetensors"))).encode()).hexdigest()


def _silent(run: str, done: int, total: int) -> None:
    pass


def _step(run: Run) -> int:
    return run.steps[-1].step if run.steps else 0
