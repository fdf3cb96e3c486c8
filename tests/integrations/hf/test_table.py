"""The table in the docs names every family, and says of each what the tests say."""

from __future__ import annotations

from pathlib import Path

import pytest

from integrations.hf._cases import NOT_COMPILED, UNMEASURED
from integrations.hf.families import FAMILIES, NATIVE, NO_BIAS, OWN, REFUSED, SERVED, TOO_OLD

TABLE = Path(__file__).parents[3] / "docs" / "families.md"


@pytest.mark.skipif(bool(TOO_OLD), reason="the table is of the transformers in requirements.lock, this one is older")
def test_the_table_is_that_of_the_tests() -> None:
    lines = [line for line in TABLE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][1:]
    rows = {cells[0]: cells[1:] for line in lines if (cells := [cell.strip() for cell in line.strip("|").split("|")])}
    assert list(rows) == sorted(FAMILIES)
    assert {name for name, row in rows.items() if row[:2] == ["yes", "yes"]} == set(SERVED)
    assert {name for name, row in rows.items() if row[6]} == set(REFUSED)
    assert {name for name, row in rows.items() if row[4] == "yes"} == set(SERVED) - set(NOT_COMPILED), "compile"
    assert {name for name, row in rows.items() if row[5] == "yes"} == set(SERVED) - set(UNMEASURED), "gradient ratio"
    bias = {"native": NATIVE, "ours": OWN, "no": [*NO_BIAS, *REFUSED]}
    for kind, families in bias.items():
        assert {name for name, row in rows.items() if row[2] == kind} == set(families), kind
