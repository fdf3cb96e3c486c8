"""How ``--help`` lays text out: prose is wrapped to the terminal, examples keep their lines where these fit."""

from __future__ import annotations

import argparse
import re
import textwrap
from itertools import groupby
from typing import Any

__all__ = ["HelpFormatter", "fit"]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """argparse's own, which wraps options, and `fit` for what stands above and below them."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.indent(fit(text, width), indent)


def fit(text: str, width: int) -> str:
    """Lines that begin with a blank are examples or tables; the others are prose, a paragraph between empty lines.

    An example that is too long has what is said of it on the next line, as all examples beside it then do.

    >>> print(fit("Two words and\\nmore.\\n\\nexamples:\\n  run --all      everything there is", 24))
    Two words and more.
    <BLANKLINE>
    examples:
      run --all
          everything there is
    """
    blocks = []
    for kind, lines in groupby(text.strip("\n").splitlines(), key=_kind):
        block = list(lines)
        if kind == "prose":
            blocks += [_paragraph(block, width)]
        elif kind == "indented" and max(map(len, block)) > width:
            blocks += [part for line in block for part in _example(line, width)]
        else:
            blocks += block
    return "\n".join(blocks) + "\n"


def _kind(line: str) -> str:
    return "empty" if not line.strip() else "indented" if line.startswith(" ") else "prose"


def _paragraph(lines: list[str], width: int) -> str:
    """A heading ("examples:") stands by itself."""
    *before, last = lines
    if re.fullmatch(r"[\w ,]+:", last):
        return "\n".join([*([textwrap.fill(" ".join(before), width)] if before else []), last])
    return textwrap.fill(" ".join(lines), width, break_long_words=False, break_on_hyphens=False)


def _example(line: str, width: int) -> list[str]:
    """Command and comment, which two blanks or more part; an option and its value stay together."""
    indent = len(line) - len(line.lstrip())
    command, _, comment = re.sub(r"(?<=\S) {2,}", "\0", line.strip(), count=1).partition("\0")
    room: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False}
    lead, under = " " * indent, " " * (indent + 4)
    kept = re.sub(r"(--[\w-]+) (?=[^-\s])", "\\1\0", command)
    wrapped = textwrap.wrap(kept, width - 2, initial_indent=lead, subsequent_indent=under, **room)
    *begun, last = (part.replace("\0", " ") for part in wrapped)
    said = textwrap.wrap(comment, width, initial_indent=under, subsequent_indent=under, **room)
    return [*(f"{part} \\" for part in begun), last, *said]  # what is copied into a shell still runs
