"""docs/fine-tuning.md says the truth: a cell of its table is a test that exists, a refusal's words, or none."""

from __future__ import annotations

import re
from pathlib import Path

from meta.test_defects import find

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
TABLE = PAGE.partition("## What was tried")[2]
TESTS = dict(re.findall(r"^- ([a-z]): `(tests/[^`]+)`$", TABLE, flags=re.MULTILINE))
CELLS = [[c.strip() for c in line.strip("|").split("|")] for line in TABLE.splitlines() if line.startswith("|")]


def test_the_table_is_whole():
    titles, _, *situations = CELLS
    assert len(titles) == 9 and len(situations) >= 12
    assert all(len(row) == len(titles) and row[0] for row in situations)


def test_every_letter_is_a_test_that_exists():
    used: set[str] = set()
    for row in CELLS[2:]:
        for cell in row[1:]:
            letters = set(cell.split()) if re.fullmatch(r"[a-z]( [a-z])*", cell) else set()
            assert letters or cell in ("", "–") or re.fullmatch('"[^"]+"', cell), cell
            used |= letters
    assert used == set(TESTS)
    for name in TESTS.values():
        find(name)


def test_every_refusal_is_said_in_the_source():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py"))
    said = re.findall('"([^"]+)"', " ".join(cell for row in CELLS[2:] for cell in row))
    assert said and all(words in source for words in said)
