"""``equipoise downstream``: trained runs answer questions through EleutherAI's evaluation harness."""

from __future__ import annotations

import argparse
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from ..errors import ConfigError

__all__ = ["EPILOG", "HELP", "add_arguments", "run"]

ROOT = Path("downstream")
HELP = "ask trained runs which continuation is the true one, through the lm-eval harness: accuracy with intervals"
EPILOG = """\
Each finished run is exported as `equipoise export` does and loaded by EleutherAI's lm-eval, which asks it two tasks of
the run's own held-out text: a prefix, and which of four continuations it had. The wrong ones are from the same domain
in one task, from other domains in the other. All runs get the same questions, so that two are compared question by
question. Nothing is downloaded.

examples:
  equipoise downstream runs/compare-20260131-120000
  equipoise downstream runs/a runs/b --questions 250 --out downstream/a-b
  lm_eval --model hf --model_args pretrained=EXPORT --include_path OUT/tasks --tasks equipoise_same_domain

The same command again goes on where it was stopped; answers are kept in OUT/answers, the numbers in
OUT/downstream.json. docs/downstream.md says what the questions are, and what small models cannot say.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, or of a comparison")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: downstream/RUN, of the first")
    parser.add_argument("--checkpoint", "--step", default="last", metavar="WHICH",
                        help="last (default); best, the lowest held-out loss of those kept; or a step")  # fmt: skip
    parser.add_argument(
        "--baseline", metavar="NAME", help="strategy that differences are taken from (default: micro, else the first)"
    )
    group = parser.add_argument_group("questions")
    group.add_argument("--questions", type=int, default=100, metavar="N",
                       help="of each domain (default 100), at most one from a held-out window")  # fmt: skip
    group.add_argument("--prefix", type=int, metavar="N", help="tokens (default: half a window)")
    group.add_argument("--continuation", type=int, metavar="N", help="tokens (default: an eighth of a window)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of the wrong choices")
    group = parser.add_argument_group("how")
    group.add_argument("--device", default="cpu", metavar="NAME", help="cpu (default), cuda, cuda:1")
    group.add_argument("--batch", type=int, default=32, metavar="N", help="sequences at a time (default 32)")


def run(arguments: argparse.Namespace) -> int:
    which: str = arguments.checkpoint
    if which not in ("last", "best") and not which.isdigit():
        raise ConfigError(expected="--checkpoint last, best or a step", got=repr(which), do="name one of them")
    if arguments.batch < 1:
        raise ConfigError(expected="--batch of 1 or more", got=str(arguments.batch), do="32 is usual")
    from ..evidence.answers_bar import AnswersBar
    from ..evidence.downstream import RESULT_NAME, Request, evaluate, finished_runs
    from ..evidence.downstream_results import render_answers
    from ..evidence.harness import require_harness
    from ..lab.comparison.progress import Preparation, open_console

    require_harness()
    request = Request(
        prefix=arguments.prefix,
        continuation=arguments.continuation,
        questions=arguments.questions,
        seed=arguments.seed,
        checkpoint=int(which) if which.isdigit() else which,
        baseline=arguments.baseline,
        device=arguments.device,
        batch=arguments.batch,
    )
    out = arguments.out or ROOT / arguments.runs[0].resolve().name
    runs, problems = finished_runs(arguments.runs)
    print("\n".join(problems), end="\n" * bool(problems), file=sys.stderr)
    console = open_console()
    with AnswersBar("loading the model", None, console, time.monotonic) as bar, ExitStack() as preparing:
        prepared = preparing.enter_context(Preparation(console))

        def on_answers(name: str, done: int, total: int) -> None:
            preparing.close()
            bar(name, done, total)

        try:
            found = evaluate(request, runs, out, on_text=prepared, on_answers=on_answers)
        except KeyboardInterrupt:
            print(f"saved in {out}; the same command goes on", file=sys.stderr)
            raise
    print(render_answers(found.runs, found.baseline))
    print(f"\nnumbers: {out / RESULT_NAME}")
    return 0
