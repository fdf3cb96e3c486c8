"""Groups of experts: read from what real policies are recorded as, and their loads against the library's own view."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from equipoise import AuxLoss, ExpertBias, Switch
from equipoise.functional.load_view import target_excess
from equipoise.report.data.groups import Grouping, group_load, groupings
from unit.report._parsed import HOSTILE
from unit.report.synthetic import header

LISTED = ((0, 5, 2, 7), (1, 3, 4, 6))
POLICIES = [
    AuxLoss("micro_batch", groups=4),
    AuxLoss("micro_batch", groups=LISTED),
    AuxLoss("micro_batch", coef=lambda step: 0.1, groups=LISTED, targets=(0.75, 0.25)),
    ExpertBias("proportional", groups=2),
    Switch(at=5, first=AuxLoss("micro_batch"), to=AuxLoss("micro_batch", groups=4)),
]


def of(*policies, experts=8, **changes):
    return replace(header("s", 0, experts=experts), policies=[repr(one) for one in policies], **changes)


@pytest.mark.parametrize("policy", POLICIES)
def test_groups_are_those_that_the_policy_sees(policy):
    (found,) = groupings([of(policy)])
    view = (policy.to if isinstance(policy, Switch) else policy).view
    assert list(found.members) == view.members(8)
    assert found.targets == pytest.approx(view.shares(8))
    counts = torch.randint(0, 50, (5, 8), generator=torch.Generator().manual_seed(0))
    ours = group_load(counts.numpy(), found)
    np.testing.assert_allclose(ours.max(-1) - 1, target_excess(view, counts))
    for row, share in zip(counts.tolist(), ours.tolist(), strict=True):
        for members, target, one in zip(found.members, found.targets, share, strict=True):
            assert one == pytest.approx(sum(row[e] for e in members) / (target * sum(row)))


def test_runs_that_share_groups_name_them_once_and_each_its_own():
    found = groupings([of(POLICIES[0]), of(POLICIES[0], POLICIES[3]), of(AuxLoss("sequence"))])
    assert [one.name for one in found] == ["4 groups of 2 experts", "2 groups of 4 experts"]
    assert found[0].order == list(range(8)) and found[0].starts == [2, 4, 6]


def test_a_router_that_chooses_groups_first_has_groups_too():
    one = of(AuxLoss("sequence"))
    limited = replace(one, config={**one.config, "model": {**one.config["model"], "num_groups": 2}})
    assert [len(found.members) for found in groupings([limited])] == [2]


@pytest.mark.parametrize(
    "line",
    [
        *HOSTILE,
        "",
        "AuxLoss(groups=1)",
        "AuxLoss(groups=8)",
        "AuxLoss(groups=3)",
        "AuxLoss(groups=-4)",
        "AuxLoss(groups=True)",
        "AuxLoss(groups='4')",
        "AuxLoss(groups=((0, 1), (2,)))",
        "AuxLoss(groups=((0, 1, 2, 3), (4, 5, 6, 6)))",
        "AuxLoss(groups=2, targets=(1.0,))",
        "AuxLoss(groups=2, targets=(0.0, 1.0))",
        "AuxLoss(groups=2, targets='ab')",
        "AuxLoss(groups=2, targets=7)",
        "(" * 3000,
        "f(groups=" + "[" * 500 + "]" * 500 + ")",
        "__import__('os').abort()",
    ],
)
def test_what_are_no_groups_of_these_experts_is_none(line):
    assert groupings([replace(of(), policies=[line])]) == []


def test_a_layer_without_tokens_has_no_load():
    (grouping,) = groupings([of(POLICIES[0])])
    assert np.isnan(group_load([[0] * 8], grouping)).all()
    assert Grouping(((0,), (1, 2)), (0.5, 0.5)).name == "2 groups of 1 to 2 experts, with shares of their own"
