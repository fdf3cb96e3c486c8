"""The invariance law as a matrix: one set of sequences, cut and run in every way, against one float64 loop over tokens.

Each case runs three optimizer steps in real processes. Compared after each: the gradients that the optimizer is given,
the counts, the biases after the step, every policy's value, MaxVio and tokens, on every rank (see ``_judge.py`` for the
tolerances, ``_case.py`` for the factors and what cannot be combined).

``make test`` runs a pairwise cover, ``make invariance`` the full product (a part with ``ARGS='-k "4ranks and ddp"'``).
``pytest tests/contracts/invariance/test_matrix.py --without-tie`` replaces the Tie by the identity on every rank and
passes only if every case then fails.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from contracts.invariance._case import CONSTRAINTS, FACTORS, TABLE, Case
from contracts.invariance._cover import Table
from contracts.invariance._judge import judge
from ranks import RankError

pytestmark = pytest.mark.xdist_group("ranks")

PAIRWISE = [Case(**row) for row in TABLE.rows()]
PART = ("ranks", "micro", "shards", "recompute", "compiled", "engine")  # the full product is run in parts, by name


PARTS = [Case(**row) for row in Table({f: FACTORS[f] for f in PART}, CONSTRAINTS).product()]


def cases_of(part: Case) -> Iterator[Case]:
    """Every way to run with these ranks, cuts and modes; every policy is in each run."""
    fixed = {f: (getattr(part, f),) for f in PART} | {"policy": ("every",)}
    yield from (Case(**row) for row in Table(FACTORS | fixed, CONSTRAINTS).product())


def name_of(part: Case) -> str:
    return "-".join([*str(part).split("-")[:5], part.engine])


def fails(ranks, case: Case, without_tie: bool) -> str:
    """What is wrong with a case; empty where it obeys the law."""
    try:
        judge(case, ranks.run("contracts.invariance._worker:train", case, without_tie, size=case.ranks, timeout=300))
    except (AssertionError, RankError) as error:
        if case.compiled != "off" and not without_tie:
            ranks.stop()  # a compiler that failed may leave the process in any state
        return f"{case}\n{error}"
    return ""


@pytest.fixture
def without_tie(request) -> bool:
    return request.config.getoption("--without-tie")


@pytest.mark.parametrize("case", PAIRWISE, ids=str)
def test_every_cut_gives_the_reference(ranks, case, without_tie):
    said = fails(ranks, case, without_tie)
    assert bool(said) == without_tie, said or "passes without the Tie"


HARD = [  # what a pair does not reach
    Case(4, 4, batch="uneven", policy="sequences_5"),  # a window over micro-batches, of which one is empty
    Case(2, 1, 2, batch="packed", loss="sum", model="twice", policy="document"),  # no f of sequences to tell calls by
    Case(2, 4, 2, batch="uneven", model="twice", policy="micro_batch"),  # equal counts on one shard, not on the other
    Case(4, 2, 2, "selective", batch="packed", engine="hsdp", loss="sum", model="twice"),
    Case(4, 4, 2, "reentrant", batch="padded", precision="bf16", engine="ddp", loss="declared"),
    Case(2, 2, batch="packed", recompute="reentrant", engine="fsdp2", loss="declared", model="masked", policy="every"),
    Case(4, 2, 2, "selective", batch="padded", engine="ddp", loss="sum", model="masked", policy="every"),
    Case(2, 4, batch="uneven", precision="bf16", model="masked", policy="unbiased"),
]


@pytest.mark.parametrize("case", HARD, ids=str)
def test_hard_cuts(ranks, case, without_tie):
    said = fails(ranks, case, without_tie)
    assert bool(said) == without_tie, said or "passes without the Tie"


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS, ids=name_of)
def test_every_cut_of_the_full_product(ranks, part, without_tie):
    said = {case: fails(ranks, case, without_tie) for case in cases_of(part)}
    wrong = [text or f"{case} passes without the Tie" for case, text in said.items() if bool(text) != without_tie]
    assert not wrong, f"{len(wrong)} of {len(said)}\n" + "\n".join(wrong)


@pytest.mark.parametrize("policy", FACTORS["policy"])
def test_a_case_fails_without_the_tie(ranks, policy):
    """The matrix can fail: a sample of what ``--without-tie`` shows of all of it."""
    case = Case(2, 2, policy=policy, batch="packed")
    assert fails(ranks, case, without_tie=True)
    assert not fails(ranks, case, without_tie=False)
