"""An evaluation on several ranks, and on one that has no batches."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.xdist_group("ranks")

EVALUATED = "contracts.law._ranks:evaluated"


def test_ranks_are_summed_and_one_without_batches_takes_part(ranks):
    alone, both = (
        ranks.run(EVALUATED, size=1)[0],
        ranks.run(EVALUATED, size=2),
    )
    assert both[0] == both[1]
    assert both[0] == {key: pytest.approx(number, rel=1e-12) for key, number in alone.items()}


@pytest.mark.parametrize("batches_on", [0, 1])
def test_a_rank_without_batches(ranks, batches_on):
    alone, both = (
        ranks.run(EVALUATED, size=1)[0],
        ranks.run(EVALUATED, batches_on, size=2),
    )
    assert both[0] == both[1] == alone
