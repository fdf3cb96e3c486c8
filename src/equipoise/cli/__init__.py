"""The command ``equipoise``: one module per command; an error is printed once and has its exit code."""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from ..errors import EquipoiseError, OutputError, unknown_name
from . import (
    adapt,
    compare,
    conformance,
    diffuse,
    doctor,
    downstream,
    export,
    fuse,
    inspect,
    plan,
    predict,
    report,
    reproduce,
    resume,
    train,
    upcycle,
)
from .help_text import HelpFormatter

__all__ = ["COMMANDS", "INTERRUPTED", "build_parser", "main"]

# A command is a module with HELP (one sentence), add_arguments(parser) and run(arguments) -> exit code. The packages of
# the extras are imported inside run: `equipoise --help` works without them, and a wrong option is refused at once.
COMMANDS = {
    "compare": compare,
    "train": train,
    "resume": resume,
    "inspect": inspect,
    "adapt": adapt,
    "report": report,
    "export": export,
    "upcycle": upcycle,
    "downstream": downstream,
    "plan": plan,
    "predict": predict,
    "doctor": doctor,
    "conformance": conformance,
    "diffuse": diffuse,
    "fuse": fuse,
    "reproduce": reproduce,
}
INTERRUPTED = 130

DESCRIPTION = """\
Keeps the experts of a mixture-of-experts model evenly loaded, and shows what each way of doing so costs.

The lab trains small language models on real text with different balancing strategies and compares them; `inspect`,
`report` and `plan` take any model or run apart, `doctor` any training configuration, `conformance` any router.
The library itself is two lines in a training loop of yours: see `python -c "import equipoise; help(equipoise)"`.
"""
EPILOG = """\
begin with:
  equipoise compare --quick                       a look: three strategies on the text of this machine, one seed
  equipoise compare                               the same to the end, five seeds: differences with intervals
  equipoise compare --data my.jsonl --strategies micro,global,loss-free
  equipoise train --strategy global@0.01+micro --set model.experts=32 --print-config > run.toml
  equipoise train run.toml                        one run; Ctrl-C saves it, `equipoise resume RUN` goes on
  equipoise inspect MODEL --data val.jsonl        which expert reads what, of any MoE model of transformers
  equipoise upcycle DENSE OUT                     a dense model of transformers as one with experts
  equipoise adapt MODEL --data val.jsonl          which of its tokens can do with fewer experts, saved for generation
  equipoise downstream RUN                        which of four continuations is true? asked by the lm-eval harness
  equipoise plan                                  what imbalance costs on your cluster
  equipoise predict --data my.jsonl --ranks 64    what the global scope is worth on your text, without training
  equipoise doctor CONFIG                         what balancing your training configuration will really do
  equipoise conformance ROUTER                    whether a router of yours balances alike in every cut
  equipoise diffuse                               images: experts that choose tokens from one image, or a whole batch
  equipoise fuse                                  text and images in one sequence: experts by modality, or mixed

exit codes:
  0    done
  1    a run failed, or an unexpected error
  2    an argument or a setting that cannot work
  3    calls in an order that was refused: it would train something else
  4    text, records or checkpoints that cannot be read
  5    a folder that cannot be written
  130  stopped by Ctrl-C or SIGTERM, after everything was saved
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` of the parsed arguments is the function to call."""
    version = importlib.metadata.version("equipoise")
    parser = argparse.ArgumentParser(
        prog="equipoise", description=DESCRIPTION, epilog=EPILOG, formatter_class=HelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"equipoise {version}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.HELP,
            epilog=getattr(module, "EPILOG", None),
            formatter_class=HelpFormatter,
            allow_abbrev=False,
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code. argparse itself exits with 2 for an argument it does not know."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given and not given[0].startswith("-") and given[0] not in COMMANDS:
        error = unknown_name("command", given[0], COMMANDS)
        print(f"equipoise: {error}", file=sys.stderr)
        return error.exit_code
    parsed = build_parser().parse_args(given)
    before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = parsed.run(parsed)
        sys.stdout.flush()
        return code
    except EquipoiseError as error:
        print(f"equipoise: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("equipoise: stopped", file=sys.stderr)
        return INTERRUPTED
    except ModuleNotFoundError as error:
        if (extra := EXTRAS.get((error.name or "").partition(".")[0])) is None:
            raise
        print(f"equipoise: expected the package {error.name}\n  got: it is not installed", file=sys.stderr)
        print(f"  do:  pip install 'equipoise[{extra}]'", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `equipoise report ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # not of what was printed
        print(f"equipoise: expected to write the output\n  got: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python fails again as it ends
        return OutputError.exit_code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


EXTRAS = {
    "PIL": "images",
    "jinja2": "report",
    "lm_eval": "downstream",
    "plotly": "report",
    "pyarrow": "lab",
    "ray": "ray",
    "rich": "lab",
    "safetensors": "lab",
    "scipy": "lab",
    "sklearn": "images",
    "tensorboard": "lab",
    "tokenizers": "lab",
    "zstandard": "lab",
    "datasets": "hf",
    "transformers": "hf",
}


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    """SIGTERM ends a command as Ctrl-C does; also where a shell's `&` has made Ctrl-C be ignored."""
    raise KeyboardInterrupt
