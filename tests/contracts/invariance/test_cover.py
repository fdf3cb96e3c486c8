"""The table of the matrix itself: every two values that may meet do, and nothing impossible is in it."""

from __future__ import annotations

import itertools

import pytest

from contracts.invariance._case import CONSTRAINTS, FACTORS, TABLE, Case
from contracts.invariance._cover import Constraint, Table
from contracts.invariance.test_matrix import PAIRWISE, PARTS, cases_of, name_of


def test_every_allowed_pair_of_the_matrix_is_covered():
    rows = [case._asdict() for case in PAIRWISE]
    covered = {(a, row[a], b, row[b]) for row in rows for a, b in itertools.combinations(FACTORS, 2)}
    missing = [(a, x, b, y) for (a, x), (b, y) in TABLE.pairs() if (a, x, b, y) not in covered]
    assert not missing
    every = sum(len(FACTORS[a]) * len(FACTORS[b]) for a, b in itertools.combinations(FACTORS, 2))
    assert len(TABLE.pairs()) > 0.98 * every, "the constraints forbid more than they should"


def test_no_case_is_impossible_and_none_comes_twice():
    assert not [TABLE.why_not(case._asdict()) for case in PAIRWISE if TABLE.why_not(case._asdict())]
    assert len(set(PAIRWISE)) == len(PAIRWISE) < 100
    assert [Case(**row) for row in TABLE.rows()] == PAIRWISE, "the same rows at every run"


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda c: "+".join(c.factors))
def test_each_constraint_excludes_something_and_says_why(constraint):
    values = itertools.product(*(FACTORS[f] for f in constraint.factors))
    excluded = [v for v in values if constraint.impossible(*v)]
    assert excluded and constraint.reason
    assert TABLE.why_not(dict(zip(constraint.factors, excluded[0], strict=True)))


def test_the_full_product_has_every_allowed_way_to_run():
    """All of the factors but the single policies: there every policy is in each run."""
    whole = Table({f: v if f != "policy" else ("every",) for f, v in FACTORS.items()}, CONSTRAINTS)
    assert len({name_of(part) for part in PARTS}) == len(PARTS)
    assert {case for part in PARTS for case in cases_of(part)} == {Case(**row) for row in whole.product()}


def test_a_table_small_enough_to_check_by_hand():
    table = Table(
        {"a": (1, 2), "b": (1, 2), "c": (1, 2)},
        [
            Constraint(("a", "b"), lambda a, b: a == b == 2, "not both 2"),
            Constraint(("b", "c"), lambda b, c: (b, c) == (1, 2), "not 1 and 2"),
        ],
    )
    # a=2 needs b=1, and b=1 needs c=1: so a=2 and c=2 never meet, though no constraint names the two
    assert (("a", 2), ("c", 2)) not in table.pairs()
    assert list(table.product()) == [
        {"a": 1, "b": 1, "c": 1}, {"a": 1, "b": 2, "c": 1}, {"a": 1, "b": 2, "c": 2}, {"a": 2, "b": 1, "c": 1}
    ]  # fmt: skip
    assert sorted(map(str, table.rows())) == sorted(map(str, table.product()))
