"""Launch lines and shell scripts: their options, words and variables, as text; nothing is run."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Launch", "read_launch", "scalar"]

ASSIGNMENT = re.compile(r"""^\s*(?:export\s+|local\s+)?([A-Za-z_]\w*)\+?=("[^"]*"|'[^']*'|\(|[^\s"']*)""")
VARIABLE = re.compile(r"\$\{(\w+)(?::?-([^{}]*))?\}|\$(\w+)")  # of nested ones the innermost
PRODUCT = re.compile(r"\$\(\(([\w\s*$]+)\)\)")
OPTION = re.compile(r"""(?:^|(?<=[\s"'(]))--?([A-Za-z][\w.\-]*)(?=[\s=)"']|$)""")
OVERRIDE = re.compile(r"^\+*([A-Za-z_]\w*(?:\.\w+)+)=(.*)$")  # hydra's a.b.c=value
# Options of launchers, which take one value; what follows is the program
LAUNCHER = ("config_file", "m", "machine_rank", "main_process_port", "master_addr", "master_port", "nnodes",
            "node_rank", "nproc_per_node", "num_machines", "num_processes", "rdzv_backend", "rdzv_endpoint",
            "rdzv_id")  # fmt: skip
NESTED = 5


@dataclass
class Launch:
    """What a launch line says: ``options`` by name with _ for -, ``overrides`` (a.b=c), and all other ``words``."""

    options: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def ranks(self) -> int | None:
        """Processes in all, of torchrun, accelerate or ms-swift's variables; None where it is not said."""
        known = {name: scalar(value) for name, value in self.variables.items()} | self.options
        for here, nodes in (("num_processes", ""), ("nproc_per_node", "nnodes"), ("NPROC_PER_NODE", "NNODES")):
            factors = [known.get(here), known.get(nodes, 1)]
            if all(isinstance(one, int) and not isinstance(one, bool) for one in factors):
                return math.prod(factors)
        return None


def scalar(text: str) -> Any:
    """The number, bool or None that a word spells, or the word.

    >>> [scalar(word) for word in ("1e-2", "8", "true", "null", "none")]
    [0.01, 8, True, None, 'none']
    """
    plain = text.strip().strip("\"'")
    named = {"true": True, "True": True, "false": False, "False": False, "None": None, "null": None}
    if plain in named:
        return named[plain]
    for kind in (int, float):
        try:
            return kind(plain)
        except ValueError:
            continue
    return plain


def read_launch(text: str) -> Launch:
    """The options of a launch line or of a whole script; of an option that is said twice the last counts.

    >>> launch = read_launch("N=8\\ntorchrun --nproc_per_node $N train.py --moe-aux-loss-coeff 1e-2 1e-4")
    >>> launch.options, launch.words, launch.ranks
    ({'nproc_per_node': 8, 'moe_aux_loss_coeff': [0.01, 0.0001]}, ['torchrun', 'train.py'], 8)
    """
    launch = Launch()
    for line in _lines(text):
        rest = _expand(line, launch.variables)
        while assigned := ASSIGNMENT.match(rest):
            name, value = assigned[1], assigned[2]
            rest = rest[assigned.end() :]
            if value != "(" and not rest.startswith(('"', "'")):  # else a list, or a text of several lines
                launch.variables[name] = value.strip("\"'")
            _read(value.strip("\"'("), launch, words=False)
        _read(rest, launch)
    return launch


def _lines(text: str) -> Iterable[str]:
    """Logical lines: continued ones joined, comments left out."""
    for line in re.sub(r"\\\s*\n", " ", text).splitlines():
        plain = re.sub(r"(^|\s)#.*$", "", line).strip()
        if plain:
            yield plain


def _expand(line: str, variables: dict[str, str]) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1] or match[3]
        return variables.get(name, f"${name}" if match[2] is None else match[2].strip("\"'"))

    def product(match: re.Match[str]) -> str:
        factors = [variables.get(one, one) for part in match[1].split("*") if (one := part.strip().lstrip("$"))]
        return str(math.prod(map(int, factors))) if all(one.isdigit() for one in factors) else match[0]

    for _ in range(NESTED):  # ${A:-${B:-c}}
        line, before = VARIABLE.sub(value, PRODUCT.sub(product, line)), line
        if line == before:
            break
    return line


def _read(line: str, launch: Launch, *, words: bool = True) -> None:
    """Takes options and overrides from a line; its other words are kept unless it is a value."""
    found = list(OPTION.finditer(line))
    before = _sorted(_words(line[: found[0].start()] if found else line), launch)
    launch.words += before if words else []
    ends = [*(one.start() for one in found[1:]), len(line)]
    for match, end in zip(found, ends, strict=False):
        name = match[1].replace("-", "_")
        values = _sorted(_words(line[match.end() : end].removeprefix("=")), launch)
        program = next((i for i, word in enumerate(values) if word.endswith(".py")), len(values))
        own = min(program, 1) if name in LAUNCHER else program
        launch.words += values[own:] if name != "m" else values
        scalars = [scalar(word) for word in values[:own]]
        launch.options[name] = True if not scalars else scalars[0] if len(scalars) == 1 else scalars


def _sorted(words: list[str], launch: Launch) -> list[str]:
    """The words that are no overrides; those go where they belong."""
    plain = []
    for word in words:
        if overridden := OVERRIDE.match(word):
            launch.overrides[overridden[1]] = scalar(overridden[2])
        else:
            plain.append(word)
    return plain


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that another line closes
        words = text.replace('"', " ").replace("'", " ").split()
    bare = (word.strip("\"'") for word in words)
    closed = (word.rstrip(")") if word.count(")") > word.count("(") else word for word in bare)  # of a list's end
    return [word for word in closed if word.strip("(;|&\\")]
