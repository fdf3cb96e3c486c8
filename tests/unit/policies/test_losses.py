"""Loss policies as values: what they ask a router to measure, and which combinations have no meaning."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.policies import ESTIMATORS, SCOPES, AuxLoss, EntropyLoss, Sequences, ZLoss
from equipoise.policies.losses import coefficient

aux: Any = AuxLoss  # as a caller without a type checker sees them
z: Any = ZLoss
neighbours: Any = Sequences


@pytest.mark.parametrize(
    ("scope", "kind", "sequences"),
    [
        ("sequence", "sequences", 1),
        (Sequences(4), "sequences", 4),
        ("document", "document", 1),
        ("micro_batch", "micro_batch", 1),
        ("data_parallel", "deferred", 1),
        ("global_batch", "deferred", 1),
        ("shuffle", "deferred", 1),
    ],
)
def test_what_a_scope_asks_the_router_to_measure(scope, kind, sequences):
    term = AuxLoss(scope).term
    assert (term.kind, term.sequences, term.unbiased) == (kind, sequences, False)


def test_only_what_a_micro_batch_cannot_know_needs_the_other_ranks_or_a_counting_pass():
    needs = {}
    for scope in SCOPES:
        for estimator in ESTIMATORS:
            policy = AuxLoss(scope, estimator=estimator)
            needs[scope, estimator] = (policy.needs_counting, policy.needs_current(counted=False))
    shuffled, ranks = ({(scope, estimator) for estimator in ESTIMATORS} for scope in ("shuffle", "data_parallel"))
    assert {key for key, (counting, _) in needs.items() if counting} == {("global_batch", "exact")} | shuffled
    now = {("global_batch", e) for e in ("prefix", "exact")}
    assert all(AuxLoss(s, estimator=e).shares == ((s, e) == ("global_batch", "filled")) for s, e in needs)
    assert {key for key, (_, current) in needs.items() if current} == now | ranks


@pytest.mark.parametrize("scope", ["sequence", "document", "micro_batch"])
def test_unbiased_counts_are_open_to_the_scopes_inside_a_micro_batch(scope):
    assert AuxLoss(scope, counts="unbiased").term.unbiased


def test_a_coefficient_is_a_number_or_a_function_of_the_step():
    assert coefficient(AuxLoss(coef=0.25), 9) == 0.25
    assert coefficient(ZLoss(coef=lambda step: 0.5**step), 3) == 0.125
    assert AuxLoss(coef=0).coef == 0


@pytest.mark.parametrize("make", [aux, z, lambda coef: EntropyLoss(coef=coef)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf, -1, None, "1e-2"])
def test_a_function_of_the_step_is_asked_at_every_step_for_a_coefficient(make, wrong):
    """A NaN of it reached every router without a word."""
    policy = make(coef=lambda step: wrong if step == 2 else torch.tensor(0.5))
    assert coefficient(policy, 1) == 0.5
    with pytest.raises(ConfigError, match=r"(?s)a coefficient >= 0 from the function of the step, at step 2.*do: "):
        coefficient(policy, 2)


def test_policies_are_values():
    policy = AuxLoss(Sequences(2), 1e-2, estimator="ema", decay=0.5)
    assert pickle.loads(pickle.dumps(policy)) == policy == AuxLoss(Sequences(2), 1e-2, estimator="ema", decay=0.5)
    assert len({policy, AuxLoss(Sequences(2), 1e-2, estimator="ema", decay=0.5)}) == 1
    with pytest.raises(AttributeError):
        policy.coef = 1.0  # pyright: ignore


@pytest.mark.parametrize(
    ("word", "make"),
    [
        ("did you mean 'global_batch'", lambda: aux("globl_batch")),
        ("Sequences(n)", lambda: aux("sequences")),
        ("scope", lambda: aux(4)),
        ("scope", lambda: aux(Sequences)),
        ("whole n", lambda: neighbours(0)),
        ("whole n", lambda: neighbours(2.5)),
        ("whole n", lambda: neighbours("8")),
        ("estimator", lambda: aux(estimator="prefx")),
        ("coefficient", lambda: aux(coef=-1e-3)),
        ("coefficient", lambda: aux(coef=math.nan)),
        ("coefficient", lambda: aux(coef=math.inf)),
        ("coefficient", lambda: aux(coef="1e-2")),
        ("coefficient", lambda: z(coef=-1)),
        ("decay", lambda: aux(decay=1.0)),
        ("decay", lambda: aux(decay="0.9")),
        ("dispatched", lambda: aux(counts="all")),
        ("unbiased", lambda: aux("global_batch", counts="unbiased")),
        ("unbiased", lambda: aux(Sequences(2), counts="unbiased")),
    ],
)
def test_what_has_no_meaning_is_refused_in_three_parts(word, make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert word in str(caught.value)
    assert caught.value.expected
    assert caught.value.got
    assert caught.value.do
