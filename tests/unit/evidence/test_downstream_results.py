"""Intervals against what they promise, and the tables."""

from __future__ import annotations

import json
import random

import pytest

from equipoise.evidence.downstream_results import Answered, accuracy, difference, pairs_of, render_answers, to_json
from equipoise.evidence.downstream_tasks import OTHERS, SAME, Question


def answered(strategy: str, seed: int, share: float, questions=40) -> Answered:
    rng = random.Random(f"{strategy} {seed}")
    right = {task: [rng.random() < share for _ in range(questions)] for task in (SAME, OTHERS)}
    return Answered(f"runs/{strategy}-{seed}", strategy, seed, 240, "ab" * 32, right)


RUNS = [answered(strategy, seed, 0.4) for strategy in ("micro", "global") for seed in (0, 1)]


@pytest.mark.parametrize(("n", "p"), [(20, 0.25), (100, 0.02), (400, 0.9)])
def test_an_accuracys_interval_holds_the_truth_as_often_as_it_says(n, p):
    rng = random.Random(n)
    held = [one.low <= p <= one.high for one in (accuracy([rng.random() < p for _ in range(n)]) for _ in range(2000))]
    assert 0.93 < sum(held) / len(held) < 0.985


@pytest.mark.parametrize(("n", "only_ours", "only_theirs"), [(30, 0.1, 0.05), (300, 0.04, 0.04), (150, 0.2, 0.1)])
def test_a_differences_interval_holds_the_truth_as_often_as_it_says(n, only_ours, only_theirs):
    rng = random.Random(n)
    held = 0
    for _ in range(2000):
        drawn = [rng.random() for _ in range(n)]
        ours = [x < only_ours or x > 0.6 for x in drawn]
        theirs = [only_ours <= x < only_ours + only_theirs or x > 0.6 for x in drawn]
        gap = difference(ours, theirs)
        held += gap.low <= only_ours - only_theirs <= gap.high
    assert 0.93 < held / 2000 < 0.985


def test_pairing_is_narrower_than_two_intervals_apart():
    ours = [i % 10 < 4 for i in range(1000)]
    theirs = [right or i % 50 == 9 for i, right in enumerate(ours)]
    gap, alone = difference(theirs, ours), accuracy(ours)
    assert gap.value == pytest.approx(0.02) and gap.low > 0
    assert gap.high - gap.low < (alone.high - alone.low) / 2
    mirrored = difference(ours, theirs)
    assert (mirrored.low, mirrored.high) == pytest.approx((-gap.high, -gap.low))


def test_the_same_answers_differ_by_nothing_and_say_how_little_that_shows():
    gap = difference([True] * 50, [True] * 50)
    assert gap.value == 0 and gap.low < 0 < gap.high


def test_pairs_are_seed_by_seed_then_over_the_seeds_then_within_a_strategy():
    pairs = pairs_of(RUNS, "micro")
    assert [(one.name, one.seeds) for one in pairs] == [
        ("global - micro", "0"),
        ("global - micro", "1"),
        ("global - micro", "all"),
        ("micro - itself", "1 - 0"),
        ("global - itself", "1 - 0"),
    ]
    first, second, over = (one.gaps[SAME] for one in pairs[:3])
    assert over.value == pytest.approx((first.value + second.value) / 2) and over.n == 2
    assert over.high - over.value == pytest.approx(12.7062 * abs(first.value - second.value) / 2)


def test_one_run_has_no_differences():
    assert pairs_of(RUNS[:1], "micro") == []
    assert "Differences" not in render_answers(RUNS[:1], "micro")


def test_tables_fit_80_columns_with_any_name():
    named = [answered("loss-free:proportional@1e-2->global+micro:exact:100", seed, 1.0) for seed in (0, 1)]
    text = render_answers([*RUNS, *named], "micro")
    assert max(map(len, text.splitlines())) <= 80
    assert "40 and 40 questions" in text and "by chance 25" in text


def test_the_numbers_have_every_domain():
    questions = {task: [Question("ab"[i % 2], "p", list("wxyz"), 0) for i in range(40)] for task in (SAME, OTHERS)}
    numbers = json.loads(json.dumps(to_json(RUNS, "micro", questions, {"seed": 0}), allow_nan=False))
    first = numbers["runs"][0]["tasks"][SAME]
    assert {name: one["n"] for name, one in first["domains"].items()} == {"a": 20, "b": 20}
    assert first["value"] == pytest.approx(sum(one["value"] for one in first["domains"].values()) / 2)
    assert [one["pair"] for one in numbers["differences"]][:1] == ["global - micro"]
