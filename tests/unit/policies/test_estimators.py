"""What each estimator says the load of a step is, against the list of all counts that there were."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, StateError
from equipoise.policies import ESTIMATORS
from equipoise.policies.estimators import LoadHistory, check_estimator

counts_of_three = st.one_of(st.just([0, 0, 0]), st.lists(st.integers(0, 9), min_size=3, max_size=3))
step_of = st.one_of(st.just([[0, 0, 0]]), st.lists(counts_of_three, min_size=1, max_size=4))  # some have no token
steps = st.lists(step_of, min_size=1, max_size=7)


def fraction(counts):
    return [c / max(sum(counts), 1) for c in counts]


def added(micro_batches):
    return [sum(column) for column in zip(*micro_batches, strict=True)]


def close(tensor, values):
    torch.testing.assert_close(tensor, torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@settings(max_examples=80, deadline=None)
@given(steps, st.sampled_from([0.0, 0.5, 0.9, 0.99]))
@example([[[0, 0, 0]], [[1, 2, 3]], [[0, 0, 0]], [[9, 0, 0]], [[0, 0, 0]], [[1, 1, 1]]], 0.5)
def test_estimators_follow_their_definitions(run, decay):
    history = LoadHistory()
    full = []  # totals of the steps that had a token
    for step in run:
        history.counted_E = torch.tensor(added(step), dtype=torch.float64)
        for m, counts in enumerate(step, start=1):
            history.add_micro_step(torch.tensor(counts, dtype=torch.float64))
            close(ESTIMATORS["prefix"](history, decay, m), fraction(added(step[:m])))
            close(ESTIMATORS["exact"](history, decay, m), fraction(added(step)))
            if not full:
                for name in ("previous", "ema"):
                    f = ESTIMATORS[name](history, decay, m)
                    assert f is None or not f.any()  # nothing known: nothing is pushed
                close(ESTIMATORS["filled"](history, decay, m), fraction(added(step[:m])))
                continue
            seen, before = added(step[:m]), full[-1]
            missing = max(sum(before) - sum(seen), 0)
            expected = [n + missing * old for n, old in zip(seen, fraction(before), strict=True)]
            close(ESTIMATORS["filled"](history, decay, m), fraction(expected))
            close(ESTIMATORS["previous"](history, decay, m), fraction(full[-1]))
            weights = [decay**age for age in range(len(full))][::-1]
            mean = [
                sum(w * fraction(total)[e] for w, total in zip(weights, full, strict=True)) / sum(weights)
                for e in range(3)
            ]
            close(ESTIMATORS["ema"](history, decay, m), mean)
        history.commit(torch.tensor(added(step), dtype=torch.float64), {decay})
        assert history.current_E is history.prefix_E is history.counted_E is None
        if any(added(step)):
            full.append(added(step))


def test_the_prefix_does_not_write_into_what_it_was_given():
    history, first = LoadHistory(), torch.tensor([1.0, 0.0])
    history.add_micro_step(first)
    history.add_micro_step(torch.tensor([5.0, 5.0]))
    assert first.tolist() == [1, 0]
    assert history.prefix_E is not None
    assert history.prefix_E.tolist() == [6, 5]


def test_averages_of_several_decays_live_side_by_side():
    history = LoadHistory()
    for counts in ([1.0, 0.0], [0.0, 1.0]):
        history.commit(torch.tensor(counts), {0.0, 0.5})
    close(ESTIMATORS["ema"](history, 0.0, 1), [0, 1])
    close(ESTIMATORS["ema"](history, 0.5, 1), [1 / 3, 2 / 3])
    assert ESTIMATORS["ema"](history, 0.9, 1) is None


def test_exact_without_a_counting_pass_works_for_one_micro_batch_and_refuses_two():
    history = LoadHistory()
    history.add_micro_step(torch.tensor([3.0, 1.0]))
    close(ESTIMATORS["exact"](history, 0.9, 1), [0.75, 0.25])
    history.add_micro_step(torch.tensor([3.0, 1.0]))
    with pytest.raises(StateError, match="counting"):
        ESTIMATORS["exact"](history, 0.9, 2)


@pytest.mark.parametrize("name", ["exakt", "", None, ["ema"]])
def test_unknown_names_are_refused_with_the_list(name):
    with pytest.raises(ConfigError, match="ema, exact, filled, prefix, previous"):
        check_estimator(name)
