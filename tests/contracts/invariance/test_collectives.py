"""How often ranks talk, and how much they say: one sum per optimizer step, at most one more per micro-step."""

from __future__ import annotations

import pytest

from contracts.invariance._case import CURRENT, FACTORS, MODELS, SINGLE, Case

pytestmark = pytest.mark.xdist_group("ranks")


def log_of(ranks, case: Case) -> list[list[tuple[str, int]]]:
    """Per optimizer step, what rank 0 launched: (kind, bytes), and "optimizer" when its step ran."""
    logs = ranks.run("contracts.invariance._worker:log_collectives", case, size=case.ranks)
    assert all(log == logs[0] for log in logs), "ranks that launch different collectives hang"
    return logs[0]


def batch_of(policy: str) -> str:
    return "packed" if policy == "document" else "equal"


def sums(log: list[tuple[str, int]]) -> list[int]:
    return [size for kind, size in log if kind == "sum"]


@pytest.mark.parametrize("micro", [1, 4])
@pytest.mark.parametrize("policy", FACTORS["policy"])
def test_one_sum_per_step_and_one_per_micro_step_where_the_current_load_is_needed(ranks, policy, micro):
    """ "exact" with several micro-batches sums its counting pass once instead."""
    for step in log_of(ranks, Case(2, micro, batch=batch_of(policy), policy=policy)):
        per_micro = policy in CURRENT or policy == "every"
        expected = 1 + (micro if per_micro else 0)
        if policy == "filled":  # at micro-steps 1, 2, 4, ...
            expected = 1 + micro.bit_length()
        if micro > 1 and policy == "exact":
            expected = 2
        if micro > 1 and policy == "every":
            expected += 1  # the others still need each micro-step
        assert len(sums(step)) == expected
        assert {kind for kind, _ in step} <= {"sum", "wait", "optimizer"}


def test_a_micro_step_sends_the_counts_and_nothing_else(ranks):
    experts = sum(e for e, _ in MODELS["different"][0])
    for policy in CURRENT:
        step = log_of(ranks, Case(2, 1, policy=policy))[1]
        assert sums(step)[0] == 8 * experts


def test_a_step_sends_what_grows_with_layers_and_experts_only(ranks):
    """O(L E) numbers of 8 bytes: whatever the tokens and micro-batches."""
    experts, layers = sum(e for e, _ in MODELS["different"][0]), len(MODELS["different"][0])
    for policy in FACTORS["policy"]:
        sizes = {
            sums(step)[-1]
            for case in (Case(2, 1), Case(2, 4), Case(2, 2, recompute="reentrant"))
            for step in log_of(ranks, case._replace(batch=batch_of(policy), policy=policy))
        }
        losses = len(SINGLE) if policy == "every" else 1
        assert len(sizes) == 1
        assert sizes.pop() <= 8 * (3 * experts + layers * (3 * losses + 18) + 5)


@pytest.mark.parametrize("recompute", ["reentrant", "non_reentrant", "selective"])
@pytest.mark.parametrize("policy", ["sequence", "prefix", "every"])
def test_recompute_launches_none(ranks, policy, recompute):
    plain = log_of(ranks, Case(2, 2, policy=policy))
    assert log_of(ranks, Case(2, 2, policy=policy, recompute=recompute)) == plain


def test_shards_cost_one_sum_per_micro_step_for_all_layers(ranks):
    """Their tables; documents also have to agree on how many there are."""
    for policy in ("sequence", "micro_batch", "prefix", "previous"):
        for step in log_of(ranks, Case(2, 2, 2, policy=policy)):
            assert len(sums(step)) == 1 + 2 * (1 + (policy in CURRENT))
    for step in log_of(ranks, Case(2, 2, 2, batch="packed", loss="sum", policy="document")):
        assert [kind for kind, _ in step if kind in ("sum", "max")].count("max") == 2
        assert len(sums(step)) == 1 + 2


def test_alone_there_are_none(ranks):
    for step in log_of(ranks, Case(1, 2)):
        assert {kind for kind, _ in step} == {"optimizer"}


def test_the_sum_of_a_step_runs_beside_the_optimizer(ranks):
    """Started before the optimizer's step, waited for after it."""
    for step in log_of(ranks, Case(2, 1, policy="sequence")):
        assert [kind for kind, _ in step] == ["sum", "optimizer", "wait"]
