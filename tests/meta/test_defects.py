"""docs/defects.md says the truth: one row for each of the 90 defects, and every test that it names exists."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "docs" / "defects.md"
NUMBERS = [f"B{n:02d}" for n in range(1, 91)]
REASONS = ("Cannot occur", "Cannot be excluded by a test", "Not tested")


def rows() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in TABLE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if re.fullmatch(r"B\d+", cells[0]):
            assert cells[0] not in found, f"{cells[0]} has two rows"
            found[cells[0]] = cells[1:]
    return found


def named_in(text: str) -> list[str]:
    return re.findall(r"`(tests/[^`]+::[^`]+)`", text)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def find(name: str) -> tuple[ast.Module, ast.FunctionDef]:
    """The file and the test (a function, perhaps in a class) that ``tests/x.py::Class::test_y`` names."""
    file, *inside = name.split("::")
    path = ROOT / file
    assert path.is_file(), f"{name}: no such file"
    node: ast.AST = tree_of(path)
    for part in inside:
        nodes = [n for n in getattr(node, "body", []) if getattr(n, "name", None) == part]
        assert len(nodes) == 1, f"{name}: {len(nodes)} definitions of {part}"
        node = nodes[0]
    assert isinstance(node, ast.FunctionDef)
    assert inside[-1].startswith("test_"), f"{name} is no test"
    return tree_of(path), node


def numbers_in(text: str) -> set[str]:
    """All that a text names: B07, and B20 to B24 with what lies between."""
    found = set(re.findall(r"B\d\d(?!\d)", text))
    for first, last in re.findall(r"B(\d\d)(?: to |-)B(\d\d)", text):
        found |= {f"B{n:02d}" for n in range(int(first), int(last) + 1)}
    return found


def test_every_defect_has_exactly_one_row_in_order():
    assert list(rows()) == NUMBERS


@pytest.mark.parametrize("number", NUMBERS)
def test_a_row_says_what_holds_the_defect_here(number):
    elsewhere, here, peers = rows()[number]
    assert 0 < len(elsewhere.split()) <= 12
    named = named_in(here)
    assert named or here.startswith(REASONS), "a test, or one sentence that says why there is none"
    for name in (*named, *named_in(peers)):
        find(name)
    assert not peers or re.match(r"[^:]+: `tests/contracts/peers/", peers)


@pytest.mark.parametrize("number", [n for n in NUMBERS if n in rows() and not rows()[n][1].startswith(REASONS)])
def test_a_test_names_its_defect(number):
    """In its name, its text or its file's docstring: whoever changes it knows what it guards."""
    said: set[str] = set()
    for name in named_in(rows()[number][1]):
        module, test = find(name)
        lines = (ROOT / name.partition("::")[0]).read_text(encoding="utf-8").splitlines()
        said |= numbers_in("\n".join(lines[test.lineno - 1 : test.end_lineno]))  # comments too
        said |= numbers_in(ast.get_docstring(module) or "")
    assert number in said, f"none of the tests of {number} names it"
