"""The findings as a table, 80 columns wide."""

from __future__ import annotations

from collections.abc import Sequence

from ..report.text.table import wrap
from .judge import COLUMNS, Finding
from .task import Adapter

__all__ = ["heading", "render_row", "summary"]

WIDTHS = (24, 24, 14, 13)


def heading(adapter: type[Adapter]) -> str:
    """What is tested, and the names of the columns."""
    head = "".join(name.ljust(width) for name, width in zip(("check", *COLUMNS), WIDTHS, strict=True))
    return f"{adapter.title()}: {adapter.scope} loss, {adapter.gate} gate\n\n{head}".rstrip()


def render_row(finding: Finding) -> str:
    """One check; a fault that others have had names theirs below."""
    name = finding.check.name.ljust(WIDTHS[0])
    if finding.skipped:
        return f"{name}- {finding.skipped}"
    error = finding.words.get("step")
    known = f"\n{' ' * WIDTHS[0]}as in {finding.known}" if finding.known else ""
    if error:
        return wrap(f"{name}{error}", " " * WIDTHS[0]) + known
    cells = (finding.words.get(column) or "-" for column in COLUMNS)
    line = name + "".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS[1:], strict=True))
    return line.rstrip() + known


def summary(findings: Sequence[Finding]) -> str:
    """How many checks held, and what to do with the others."""
    made = [finding for finding in findings if not finding.skipped]
    wrong = [finding for finding in made if not finding.passed]
    lines = [f"{len(made) - len(wrong)} of {len(made)} checks right"]
    if len(made) < len(findings):
        lines[0] += f", {len(findings) - len(made)} not made"
    if wrong:
        lines += ["", *(wrap(f"{one.check.name}: {one.check.what}", "  ") for one in wrong)]
        lines += ["", "B-numbers: docs/defects.md, public defects of the same kind"]
    return "\n".join(lines)
